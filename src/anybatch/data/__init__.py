"""Data sets by name, their splits, and the checks that they pass before training."""

from collections.abc import Callable
from typing import Any

from anybatch.data.arrays import Examples, load_npz
from anybatch.data.cifar10 import load_cifar10
from anybatch.data.csv import load_csv
from anybatch.data.data_set import DataSet, MapStyle, as_data_set, concatenate
from anybatch.data.hugging_face import load_hugging_face
from anybatch.data.idx import load_fashion_mnist, load_idx
from anybatch.data.parquet import load_parquet
from anybatch.data.scikit_learn import load_diabetes, load_digits
from anybatch.data.sequences import Sequences
from anybatch.data.splits import OrderWithin, Splits, split
from anybatch.data.stored import Stored
from anybatch.data.text import Text, load_lines, load_text
from anybatch.data.verses import load_verses

__all__ = [
    "DataSet",
    "Examples",
    "MapStyle",
    "OrderWithin",
    "Sequences",
    "Splits",
    "Stored",
    "Text",
    "as_data_set",
    "concatenate",
    "load_cifar10",
    "load_csv",
    "load_diabetes",
    "load_digits",
    "load_fashion_mnist",
    "load_hugging_face",
    "load_idx",
    "load_lines",
    "load_npz",
    "load_parquet",
    "load_text",
    "load_verses",
    "sources",
    "split",
]

sources: dict[str, Callable[..., Any]] = {
    "cifar10": load_cifar10,
    "csv": load_csv,
    "diabetes": load_diabetes,
    "digits": load_digits,
    "fashion_mnist": load_fashion_mnist,
    "hugging_face": load_hugging_face,
    "idx": load_idx,
    "lines": load_lines,
    "npz": load_npz,
    "parquet": load_parquet,
    "text": load_text,
    "verses": load_verses,
}
