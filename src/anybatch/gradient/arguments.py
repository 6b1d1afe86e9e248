"""Check the types of the arguments of public functions.

A wrong type is refused at once, with the name of the argument. Otherwise it would fail far away
from the call, or be ignored: a clip of 1.0 would clip nothing.
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
from anybatch.precision import check_precision
from anybatch.randomness import Key
from anybatch.schedules import check_schedule

__all__ = ["check_arguments", "to_ids"]


P = ParamSpec("P")
R = TypeVar("R")


class _Rule(NamedTuple):
    kinds: tuple[type, ...]
    error: type[AnybatchError]
    words: str


_RULES = {
    "model": _Rule((nn.Module,), ModelError, "a torch.nn.Module, an instance and not a class"),
    "objective": _Rule((Objective,), LossError, "ab.Objective(example_losses, ...)"),
    "key": _Rule((Key, NoneType), ModelError, "ab.Key(seed, step) or None"),
    "layout": _Rule((Layout, NoneType), LayoutError, "ab.Layout(micro_batch=...) or None"),
    "observe": _Rule((Observe, NoneType), LedgerError, "ab.Observe(norms=True, ...) or None"),
    "clip": _Rule(
        (ClipNorm, ClipExamples, NoneType),
        LossError,
        "ab.ClipNorm(max_norm), ab.ClipExamples(max_norm) or None",
    ),
    "reduction_state": _Rule(
        (Mapping, NoneType), LossError, "gradient.reduction_state of the last update, or None"
    ),
    "group": _Rule(
        (ProcessGroup, NoneType), ModelError, "a process group of torch.distributed, or None"
    ),
    "order": _Rule(
        (OrderProtocol,),
        OrderError,
        "ab.Order(len(data), batch_size=...) or another order; a loader or sampler is none",
    ),
    "collate": _Rule((Callable, NoneType), DataError, "a function of a list of examples"),  # type: ignore[arg-type]
    "transform": _Rule((Callable, NoneType), DataError, "a function of (example, key)"),  # type: ignore[arg-type]
    "state": _Rule((Mapping, NoneType), RunError, 'a dict, {"name": object}, or None'),
    "folder": _Rule((str, PathLike), RunError, "the path of a folder"),
    "metrics": _Rule(
        (Mapping, nn.ModuleDict, NoneType),
        LossError,
        'a dict, {"accuracy": metric}, a MetricCollection of torchmetrics, or None',
    ),
    "settings": _Rule((Mapping, NoneType), RunError, "a dict of plain JSON, or None"),
    "trackers": _Rule((Iterable,), RunError, "a list of trackers"),
    "bitwise": _Rule((bool,), ModelError, "True or False"),
    "self_check": _Rule((bool, str), ModelError, "True or False"),
    "shard": _Rule((bool,), ModelError, "True or False"),
}


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that it refuses arguments of the wrong type.

    Raises:
        AnybatchError: it names the argument, and says what is expected.
    """
    names = list(signature(function).parameters)

    @wraps(function)
    def check(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            rule = _RULES.get(name)
            if rule is not None and not isinstance(value, rule.kinds):
                raise rule.error(f"{name} is {_show(value)}. It must be {rule.words}.")
            if name in _CHECKS:
                _CHECKS[name](name, value)
        return function(*args, **kwargs)

    return check


def _check_step(name: str, step: object) -> None:
    if not (step is None and name == "stop") and not (is_count(step) or step == 0):
        raise OrderError(f"{name} is {_show(step)}. It must be the number of an update, from 0.")


def _check_loss_scale(name: str, loss_scale: Any) -> None:
    if not is_number(loss_scale) or not 0 < float(loss_scale) < float("inf"):
        raise LossError(
            f"loss_scale is {_show(loss_scale)}. It must be a finite number above 0, such as 65536."
        )


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "loss_scale": _check_loss_scale,
    "precision": lambda name, precision: check_precision(precision),
    "schedule": lambda name, schedule: check_schedule(schedule),
    "start": _check_step,
    "stop": _check_step,
}


def to_ids(ids: Any) -> Tensor:
    """Convert the ids of examples to a tensor on the CPU.

    Raises:
        BatchError: ids that are no integers.
    """
    if type(ids) is Tensor and ids.dtype == torch.int64 and ids.is_cpu:
        return ids
    try:
        tensor = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            f"ids is {_show(ids)}. torch cannot convert it to a tensor: {error}. Pass one integer "
            f"per example."
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise BatchError(f"ids are {tensor.dtype}. They must be integers, one per example.")
    return tensor


def _show(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:60]}... of type {type(value).__name__}"
