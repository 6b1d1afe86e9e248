"""Every source is named in the documents with its arguments, and a recipe can name it."""

import csv
import struct
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anybatch.data import load_digits, sources
from anybatch.recipe.build import build
from command_line import recipe

TABLE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def arguments_of(name: str) -> str:
    """Read the arguments of a source in the table of sources."""
    cells = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
    (examples,) = (row[1] for row in cells if f"`{name}`" in row[0] and "." not in row[0])
    return examples


@pytest.mark.parametrize("name", sorted(sources))
def test_the_table_names_the_source_and_its_arguments(name: str) -> None:
    described = arguments_of(name)
    missing = [one for one in signature(sources[name]).parameters if f"`{one}" not in described]
    assert missing == []


def as_csv(folder: Path, images: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    rows = [[label, *pixels] for pixels, label in zip(images.tolist(), classes, strict=True)]
    with open(folder / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows([["y", *(f"x{n}" for n in range(64))], *rows])
    return {"path": str(folder / "d.csv"), "target": "y"}


def as_parquet(folder: Path, images: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    pixels = pa.array(images.tolist(), pa.list_(pa.float32(), 64))
    pq.write_table(pa.table({"x": pixels, "y": classes}), folder / "d.parquet")
    return {"path": str(folder / "d.parquet"), "target": "y"}


def as_idx(folder: Path, images: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    pixels = struct.pack(">2x2B3I", 8, 3, len(images), 8, 8) + (images * 16).astype("u1").tobytes()
    (folder / "images").write_bytes(pixels)
    (folder / "labels").write_bytes(
        struct.pack(">2x2BI", 8, 1, len(classes)) + bytes(classes.tolist())
    )
    return {"images": str(folder / "images"), "labels": str(folder / "labels"), "scale": 16}


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_idx])
def test_the_digits_in_a_file_are_the_digits_in_a_recipe(tmp_path: Path, write: Any) -> None:
    digits = load_digits()
    images = digits.inputs[:200].flatten(1).numpy()
    classes = digits.targets[:200].numpy()
    args = write(tmp_path, images, classes)
    keys = {"data.name": write.__name__.removeprefix("as_"), "data.args": args, "batch.size": 4}
    examples = build(recipe(**keys), allow_code=False).data
    np.testing.assert_array_equal(examples.inputs.flatten(1).numpy(), images)
    np.testing.assert_array_equal(examples.targets.numpy(), classes)
