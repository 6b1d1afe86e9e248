"""Data of benchmarks/scaling_rules.py: Fashion-MNIST, or digits where its files are missing.

Batch sizes above the training set are left out. An environment variable chooses the data once for a
process and those that it spawns, because the parts have their sizes as constants.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anybatch.data import load_digits, load_fashion_mnist
from anybatch.data.idx import DEBIAN, FASHION_MNIST
from anybatch.data.splits import split

__all__ = [
    "ALL",
    "DATA",
    "VARIABLE",
    "Data",
    "by_data",
    "find_data",
    "keep_smaller",
    "load_images",
]

VARIABLE = "SCALING_RULES_DATA"
HELD_OUT = 0.2  # of digits, which have no test set of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Images for training and for testing."""

    name: str  # in recipes
    result: str  # name of the raw result
    full: int  # examples of the training set
    held_out_examples: int
    inputs: int  # pixels of an image
    mean: float  # of all pixels
    deviation: float
    held_out: float | Mapping[str, str]  # in recipes


ALL = {
    data.name: data
    for data in (
        Data(
            name="fashion_mnist",
            result="scaling_rules",
            full=60_000,
            held_out_examples=10_000,
            inputs=784,
            mean=0.286,
            deviation=0.353,
            held_out={"part": "test"},
        ),
        Data(
            name="digits",
            result="scaling_rules_digits",
            full=1438,
            held_out_examples=359,
            inputs=64,
            mean=0.305,
            deviation=0.376,
            held_out=HELD_OUT,
        ),
    )
}
DATA = ALL[os.environ.get(VARIABLE, "fashion_mnist")]


def find_data(folder: str = DEBIAN) -> str:
    """Return the data to use: digits, with a message, where no file of Fashion-MNIST is there.

    Raises:
        DataError: some of its files are missing, or one is damaged.
    """
    if not any(
        Path(folder, f"{part}-images-idx3-ubyte.gz").exists() for part in FASHION_MNIST["all"]
    ):
        print(
            f"Fashion-MNIST is not in {folder} (apt install dataset-fashion-mnist), so the runs "
            f"are on scikit-learn's digits, without the batch sizes above {ALL['digits'].full:,}.",
            flush=True,
        )
        return "digits"
    load_fashion_mnist("all", folder)
    return "fashion_mnist"


def load_images(part: str) -> tuple[Tensor, ...]:
    """Return images [N, 1, rows, columns] in 0 .. 1 and classes [N] of "train" or "test"."""
    if DATA.name == "fashion_mnist":
        return load_fashion_mnist(part).columns
    digits = load_digits()
    parts = split(digits.targets, HELD_OUT)
    ids = parts.train if part == "train" else parts.held_out
    return tuple(column[ids] for column in digits.columns)


def keep_smaller(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes below that of the training set."""
    return tuple(size for size in sizes if size < DATA.full)


def by_data(values: Mapping[str, Any]) -> Any:
    """Return the value for the data in use."""
    return values[DATA.name]
