"""Data sets by name, their splits, and the checks that they pass before training."""

from collections.abc import Callable
from typing import Any

from anybatch.data.arrays import Examples, load_npz
from anybatch.data.cifar10 import load_cifar10
from anybatch.data.digits import load_digits
from anybatch.data.fashion_mnist import load_fashion_mnist
from anybatch.data.idx import load_idx
from anybatch.data.parquet import load_parquet
from anybatch.data.splits import OrderWithin, Splits, split
from anybatch.data.table import load_csv
from anybatch.data.text import Text, load_text

__all__ = [
    "Examples",
    "OrderWithin",
    "Splits",
    "Text",
    "load_cifar10",
    "load_csv",
    "load_digits",
    "load_fashion_mnist",
    "load_idx",
    "load_npz",
    "load_parquet",
    "load_text",
    "sources",
    "split",
]

sources: dict[str, Callable[..., Any]] = {
    "cifar10": load_cifar10,
    "csv": load_csv,
    "digits": load_digits,
    "fashion_mnist": load_fashion_mnist,
    "idx": load_idx,
    "npz": load_npz,
    "parquet": load_parquet,
    "text": load_text,
}
