"""Data sets by name, their splits, and the checks that they pass before training."""

from collections.abc import Callable
from typing import Any

from anybatch.data.arrays import Examples, load_npz
from anybatch.data.digits import load_digits
from anybatch.data.splits import OrderWithin, Splits, split

__all__ = ["Examples", "OrderWithin", "Splits", "load_digits", "load_npz", "sources", "split"]

sources: dict[str, Callable[..., Any]] = {"digits": load_digits, "npz": load_npz}
