"""What the loop asks of an optimiser, and the rates that it sets.

lr of group g = schedule(examples) * own_g / default
"""

import inspect
import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch.batch import is_number
from anybatch.errors import ModelError
from anybatch.gradient.survey import check_parameter
from anybatch.training.sharded import ShardedOptimizer

__all__ = ["check_optimizer", "set_rates"]


def check_optimizer(optimizer: Optimizer, model: nn.Module, schedule: Any) -> None:
    """Refuse an optimiser that a batch's one gradient cannot serve.

    Raises:
        ModelError: one that evaluates the loss itself, one over other parameters than the
            model's, or, with a schedule, one of which no group has the default rate, or whose rate
            is not that of the schedule.
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
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError as error:
        raise ModelError(
            f"{kind}.step() needs a closure that evaluates the loss again, expected an optimiser "
            f"that takes one gradient a batch, such as SGD or AdamW."
        ) from error
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if strange := [p for p in held if id(p) not in own]:
        raise ModelError(
            f"{kind} holds {len(strange)} of {len(held)} parameters that are not the model's, "
            f"expected only the model's: the others get no gradient of the batch. Was the model "
            f"copied or rebuilt since? Make parameters of the loss part of the model."
        )
    if schedule is not None:
        _check_rates(optimizer)
        _check_first_rate(optimizer, schedule)


def set_rates(optimizer: Optimizer | ShardedOptimizer, lr: Any) -> None:
    """Set the optimiser's rate; groups with a rate of their own keep their proportion to it."""
    is_rate = is_number(lr) or (isinstance(lr, Tensor) and lr.ndim == 0)
    if not (is_rate and 0 <= float(lr) < math.inf):
        raise ModelError(
            f"the schedule gave the learning rate {lr!r}. It must return a finite number of at "
            f"least 0 for every number of examples."
        )
    lr, default = float(lr), optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        own = group.setdefault("initial_lr", group["lr"])
        group["lr"] = lr if own == default else lr * (own / default)


def _check_rates(optimizer: Optimizer) -> None:
    default = optimizer.defaults.get("lr")
    own: list[Any] = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    if default is None or default not in own or (default == 0 and any(rate != 0 for rate in own)):
        raise ModelError(
            f"a schedule sets the default rate of {type(optimizer).__name__}, {default}, and the "
            f"groups keep their proportion to it; but their rates are {own}, none of them that. "
            f"Give the optimiser lr=, the rate that the schedule speaks of."
        )


def _check_first_rate(optimizer: Optimizer, schedule: Any) -> None:
    """Refuse a schedule of another rate: its factor may stand where its rate belongs."""
    while hasattr(schedule, "schedule"):  # of a warm-up
        schedule = schedule.schedule
    given, default = getattr(schedule, "lr", None), optimizer.defaults["lr"]
    if isinstance(given, float | int) and not math.isclose(given, float(default), rel_tol=1e-6):
        raise ModelError(
            f"{type(schedule).__name__} begins at the learning rate {given}, and the optimiser was "
            f"made with lr={float(default)}. Give both the same. The first argument of a schedule "
            f"is the rate itself, and not the factor that it is multiplied by."
        )
