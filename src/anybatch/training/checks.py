"""Checks of the arguments and of the losses of `steps`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from anybatch import distributed
from anybatch.batch import is_count
from anybatch.distributed import ProcessGroup
from anybatch.errors import DivergenceError, ModelError, OrderError, RunError
from anybatch.gradient import Gradient
from anybatch.optim.closures import needs_closure
from anybatch.optim.rates import check_optimizer
from anybatch.optim.zero import check_elementwise
from anybatch.order import OrderProtocol
from anybatch.precision import Precision
from anybatch.runs.run import Run

__all__ = [
    "check_fsdp",
    "check_loss",
    "check_step",
    "count_updates",
    "open_run",
    "prepare_scheduler",
]

SCHEDULER = "schedule"  # its name among the user's objects


def open_run(run: Run | str | Path | None, group: ProcessGroup | None) -> Run | None:
    """Open the run of a folder.

    Raises:
        RunError: the run cannot be opened, or is open for other ranks.
    """
    if isinstance(run, str | Path):
        return Run(run, group=group)
    if not isinstance(run, Run | None):
        raise RunError(f"run is {run!r}. It must be a folder, ab.Run(folder) or None.")
    if run is not None and run.group is not group:
        raise RunError(
            f"the run is open for {distributed.get_num_ranks(run.group)} ranks and steps() trains "
            f"on {distributed.get_num_ranks(group)}. Give Run(...) and steps(...) the same group=."
        )
    return run


def count_updates(order: OrderProtocol, epochs: int | None, steps: int | None) -> int:
    """Return the number of updates of a training.

    Raises:
        OrderError: neither or both numbers are given, or they make no update.
    """
    if (epochs is None) == (steps is None):
        which = "neither" if steps is None else "both"
        raise OrderError(
            f"steps() got {which} of epochs= and steps=. Pass one: the number of passes over the "
            f"data, or of updates."
        )
    if steps is not None:
        if not is_count(steps):
            raise OrderError(f"steps is {steps!r}. It must be a number of updates, at least 1.")
        return int(steps)
    assert epochs is not None
    total = order.num_steps(epochs)
    if total < 1:
        raise OrderError(f"{epochs} epochs of this order make no update. Make at least one.")
    return total


def _check_scheduler(scheduler: LRScheduler, optimizer: Optimizer, *, shard: bool) -> None:
    """Refuse a scheduler of torch that cannot take a step after each update."""
    kind = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ModelError(
            "ReduceLROnPlateau needs a metric at each step. Leave schedule out, call its "
            'step(metric) in the body of the loop, and pass state={"scheduler": scheduler}.'
        )
    if getattr(scheduler, "optimizer", None) is not optimizer:
        raise ModelError(
            f"the {kind} belongs to another optimiser than the one of this loop. Make it with "
            f"this optimiser."
        )
    if shard:
        raise ModelError(
            f"shard=True with a {kind} of torch, which would change the optimiser whose state is "
            f"taken away. Use a schedule of anybatch, such as ab.Cosine, or leave shard out."
        )


def prepare_scheduler(
    schedule: Any, optimizer: Optimizer, state: Mapping[str, Any] | None, *, shard: bool
) -> tuple[dict[str, Any], Any]:
    """Add a scheduler of torch to the user's objects, so that checkpoints hold it.

    Returns:
        The user's objects, and what the settings of a run say of the schedule.

    Raises:
        RunError: the user has an object of its name. ModelError: the scheduler cannot be used.
    """
    objects = dict(state or {})
    if not isinstance(schedule, LRScheduler):
        return objects, schedule
    _check_scheduler(schedule, optimizer, shard=shard)
    if SCHEDULER in objects:
        raise RunError(
            f"state has an object {SCHEDULER!r}, the name of the scheduler that was passed as "
            f"schedule=. Rename it, or leave the scheduler out of it."
        )
    return objects | {SCHEDULER: schedule}, f"a {type(schedule).__name__} of torch"


def check_step(
    optimizer: Optimizer, model: nn.Module, schedule: Any, precision: Precision, *, shard: bool
) -> None:
    """Refuse an optimiser that does not fit the model, the schedule or the other options."""
    check_optimizer(optimizer, model, schedule)
    _check_closure(optimizer, precision, shard=shard)


def _check_closure(optimizer: object, precision: Precision, *, shard: bool) -> None:
    """Refuse options that do not work for an optimiser that evaluates the loss itself."""
    if not needs_closure(optimizer):
        return
    kind = type(optimizer).__name__
    if precision == "float16":
        raise ModelError(
            f"precision is 'float16', and {kind} evaluates the loss itself: an evaluation that is "
            f"not finite could not be skipped. Use 'bfloat16' or 'float32'."
        )
    if shard:
        raise ModelError(f"shard=True with {kind}, which is not element-wise. Leave shard out.")


def check_fsdp(
    optimizer: Optimizer, group: ProcessGroup | None, *, shard: bool, bitwise: bool
) -> None:
    """Raise if an option does not work for a model that `fully_shard` has sharded."""
    if shard:
        raise ModelError(
            "shard=True with a model that fully_shard has sharded. Its optimiser holds only the "
            "state of its slices already. Leave shard out."
        )
    if bitwise:
        distributed.call_together(lambda: check_elementwise(optimizer), group)


def check_loss(gradient: Gradient, step: int) -> float:
    """Return the loss as a number, and raise if it is not finite."""
    loss: Any = gradient.loss.item()
    if not math.isfinite(loss):  # its terms are finite: `batch_gradient` has checked them
        parts = {name: part.item() for name, part in gradient.parts.items()}
        raise DivergenceError(
            f"the loss of step {step} is {loss}, and its parts are {parts}. A penalty overflows "
            f"when weights have grown without limit. Lower the learning rate."
        )
    return float(loss)
