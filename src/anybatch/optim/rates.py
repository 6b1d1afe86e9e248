"""Check an optimiser before training, and set its learning rates.

lr of group g = schedule(examples) * (first lr of g) / default lr
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anybatch.batch import is_number
from anybatch.errors import ModelError
from anybatch.gradient.survey import check_parameter
from anybatch.optim.zero import ShardedOptimizer

__all__ = ["check_optimizer", "follow_schedule", "set_rates"]


def check_optimizer(optimizer: Optimizer, model: nn.Module, schedule: Any) -> None:
    """Refuse an optimiser that does not fit the model or the schedule.

    Raises:
        ModelError: the optimiser holds parameters that are not the model's. With a schedule: no
            group has the default rate, or it is another than the schedule's.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        raise ModelError(
            f"optimizer is a {kind}. It must be one optimiser of torch.optim over the model's "
            f"parameters. For several rates or kinds of decay, give it parameter groups: "
            f'torch.optim.AdamW([{{"params": body}}, {{"params": head, "lr": 1e-3}}]).'
        )
    for name, p in model.named_parameters():
        check_parameter(name, p)
    ids = {id(p) for p in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if others := [p for p in parameters if id(p) not in ids]:
        raise ModelError(
            f"{kind} holds {len(others)} of {len(parameters)} parameters that are not the model's. "
            f"They would get no gradient of the batch. Was the model copied or rebuilt since? Make "
            f"parameters of the loss part of the model."
        )
    if schedule is not None and not isinstance(schedule, LRScheduler):
        _check_rates(optimizer)
        _check_first_rate(optimizer, schedule)


def set_rates(optimizer: Optimizer | ShardedOptimizer, lr: Any) -> None:
    """Set the learning rate; groups with another rate keep their proportion to it."""
    is_rate = is_number(lr) or (isinstance(lr, Tensor) and lr.ndim == 0)
    if not (is_rate and 0 <= float(lr) < math.inf):
        raise ModelError(
            f"the schedule gave the learning rate {lr!r}. It must return a finite number of at "
            f"least 0 for every number of examples."
        )
    lr, default = float(lr), optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        first = group.setdefault("initial_lr", group["lr"])
        group["lr"] = lr if first == default else lr * (first / default)


def follow_schedule(
    optimizer: Optimizer | ShardedOptimizer, schedule: Any, num_examples: int
) -> None:
    """Set the rate after so many examples, unless a scheduler of torch or nothing sets it."""
    if schedule is not None and not isinstance(schedule, LRScheduler):
        set_rates(optimizer, schedule(num_examples))


def _check_rates(optimizer: Optimizer) -> None:
    default = optimizer.defaults.get("lr")
    rates: list[Any] = [g.get("initial_lr", g.get("lr")) for g in optimizer.param_groups]
    if default is None or default not in rates or (default == 0 and any(r != 0 for r in rates)):
        raise ModelError(
            f"a schedule sets the default rate of {type(optimizer).__name__}, {default}, and the "
            f"groups keep their proportion to it; but their rates are {rates}, none of them that. "
            f"Give the optimiser lr=, the rate that the schedule speaks of."
        )


def _check_first_rate(optimizer: Optimizer, schedule: Any) -> None:
    """Refuse a schedule with another rate: somebody may have passed a factor as its rate."""
    while hasattr(schedule, "schedule"):  # a warm-up holds another schedule
        schedule = schedule.schedule
    rate, default = getattr(schedule, "lr", None), optimizer.defaults["lr"]
    if isinstance(rate, float | int) and not math.isclose(rate, float(default), rel_tol=1e-6):
        raise ModelError(
            f"{type(schedule).__name__} begins at the learning rate {rate}, and the optimiser was "
            f"made with lr={float(default)}. Give both the same. The first argument of a schedule "
            f"is the rate itself, and not the factor that it is multiplied by."
        )
