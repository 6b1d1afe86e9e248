"""Arguments of public functions, checked where they come in.

Something of the wrong type is refused by its name at once. Otherwise it would fail far away from
the call, or be left unused: a clip of 1.0 would clip nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from os import PathLike
from types import NoneType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from anybatch.batch import is_count, is_number
from anybatch.distributed import ProcessGroup
from anybatch.errors import (
    AnybatchError,
    BatchError,
    DataError,
    LayoutError,
    LedgerError,
    LossError,
    ModelError,
    OrderError,
    RunError,
)
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.layout import Layout
from anybatch.ledger.ledger import Observe
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.randomness import Key
from anybatch.schedules import check_schedule

__all__ = ["as_ids", "check_arguments"]


P = ParamSpec("P")
R = TypeVar("R")


class _Expected(NamedTuple):
    kinds: tuple[type, ...]
    error: type[AnybatchError]
    words: str


_EXPECTED = {
    "model": _Expected((nn.Module,), ModelError, "a torch.nn.Module, made already"),
    "objective": _Expected((Objective,), LossError, "ab.Objective(example_losses, ...)"),
    "key": _Expected((Key, NoneType), ModelError, "ab.Key(seed, step) or None"),
    "layout": _Expected((Layout, NoneType), LayoutError, "ab.Layout(micro_batch=...) or None"),
    "observe": _Expected((Observe, NoneType), LedgerError, "ab.Observe(norms=True, ...) or None"),
    "clip": _Expected(
        (ClipNorm, ClipExamples, NoneType),
        LossError,
        "ab.ClipNorm(max_norm), ab.ClipExamples(max_norm) or None",
    ),
    "reduction_state": _Expected(
        (Mapping, NoneType), LossError, "gradient.reduction_state of the last update, or None"
    ),
    "group": _Expected(
        (ProcessGroup, NoneType), ModelError, "a process group of torch.distributed, or None"
    ),
    "order": _Expected(
        (OrderProtocol,), OrderError, "ab.Order(len(data), batch_size=...) or another order"
    ),
    "collate": _Expected((Callable, NoneType), DataError, "a function of a list of examples"),  # type: ignore[arg-type]
    "transform": _Expected((Callable, NoneType), DataError, "a function of (example, key)"),  # type: ignore[arg-type]
    "state": _Expected((Mapping, NoneType), RunError, 'a dict, {"name": object}, or None'),
    "folder": _Expected((str, PathLike), RunError, "the path of a folder"),
    "settings": _Expected((Mapping, NoneType), RunError, "a dict of plain JSON, or None"),
    "trackers": _Expected((Iterable,), RunError, "a list of trackers"),
    "bitwise": _Expected((bool,), ModelError, "True or False"),
    "self_check": _Expected((bool, str), ModelError, "True or False"),
    "shard": _Expected((bool,), ModelError, "True or False"),
}


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that it refuses arguments of the wrong type.

    Raises:
        AnybatchError: it names the argument, and says what is expected.
    """
    names = list(signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            _check(name, value)
        return function(*args, **kwargs)

    return checked


def _check(name: str, value: object) -> None:
    if name == "loss_scale":
        _check_loss_scale(value)
    if name == "schedule":
        check_schedule(value)
    if name in ("start", "stop"):
        _check_step(name, value)
    if name in _EXPECTED and not isinstance(value, _EXPECTED[name].kinds):
        raise _EXPECTED[name].error(
            f"{name} is {_show(value)}. It must be {_EXPECTED[name].words}."
        )


def _check_step(name: str, step: object) -> None:
    if not (step is None and name == "stop") and not (is_count(step) or step == 0):
        raise OrderError(f"{name} is {_show(step)}. It must be the number of an update, from 0.")


def _check_loss_scale(loss_scale: Any) -> None:
    if not is_number(loss_scale) or not 0 < float(loss_scale) < float("inf"):
        raise LossError(
            f"loss_scale is {_show(loss_scale)}. It must be a finite number above 0, such as 65536."
        )


def as_ids(ids: Any) -> Tensor | None:
    """Make a tensor on the CPU of the ids of examples.

    Raises:
        BatchError: ids that are no integers.
    """
    if ids is None:
        return None
    try:
        found = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            f"ids is {_show(ids)}, of which torch makes no tensor: {error}. Pass one integer for "
            f"each example."
        ) from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise BatchError(f"ids are {found.dtype}. They must be integers, one for each example.")
    return found


def _show(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) < 80 else f"{shown[:60]}... of type {type(value).__name__}"
