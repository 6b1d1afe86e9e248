"""Small Parquet files of known numbers, and what is read of them through a cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from anybatch.data import load_parquet
from anybatch.data.stored import Stored


def numbers(shape: tuple[int, ...], kind: str = "f4") -> NDArray[Any]:
    """Any numbers, the same each time."""
    return np.random.default_rng(0).integers(0, 200, shape).astype(kind)


def write_source(path: Path, inputs: NDArray[Any], **others: Any) -> str:
    """A Parquet file of these, with classes 0 .. N-1 as the target."""
    array = pa.array(inputs.reshape(-1))
    for size in reversed(inputs.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    others = {"y": np.arange(len(inputs)), **others}
    pq.write_table(pa.table({"x": array, **others}), path, row_group_size=7)
    return str(path)


def read_cached(path: str, **options: Any) -> Stored:
    """Return its examples, through its cache."""
    result = load_parquet(path, "y", "x", cache=True, **options)
    assert isinstance(result, Stored)
    return result


def rows_of(data: Stored) -> Any:
    """All inputs."""
    return data.inputs.rows(torch.arange(len(data)))


def folder_of(path: str) -> Path:
    """Return the one cache of a file."""
    (folder,) = (folder for folder in Path(f"{path}.cache").iterdir() if folder.is_dir())
    return folder
