"""Store what earlier updates have learnt about a model, for as long as the model lives.

A record is a class with default values. Each part of the package has its own kind of record, such
as the random draws that `gradient` has observed or the plans that `ledger` has checked. One weak
map holds them all, so that nothing is attached to the model and a copy of a model starts afresh.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["find_record"]

T = TypeVar("T")

_records: WeakKeyDictionary[nn.Module, dict[Callable[[], Any], Any]] = WeakKeyDictionary()


def find_record(model: nn.Module, kind: Callable[[], T]) -> T:
    """Return the model's record of a kind, a new one if there is none yet.

    Args:
        kind: class of the record, or another function that creates an empty one.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> find_record(model, list).append("draws random numbers")
        >>> find_record(model, list), find_record(nn.Linear(2, 1), list)
        (['draws random numbers'], [])
    """
    records = _records.get(model)
    if records is None:
        records = _records[model] = {}
    if kind not in records:
        records[kind] = kind()
    record: T = records[kind]
    return record
