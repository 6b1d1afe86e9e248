"""Runs that fail: a loss that grows without end, what to do about it, and what is left."""

from pathlib import Path

from anybatch.errors import DivergenceError
from anybatch.recipe.build import Built
from anybatch.recipe.fit import describe_raw_bytes
from anybatch.runs import checkpoints
from anybatch.training.loop import Step

__all__ = ["DIVERGED", "advise_on_divergence", "describe_rest", "refuse_divergence"]

DIVERGED = 1000.0
"""A loss this many times the first (or 1, whichever is more) is no training any more."""


def refuse_divergence(step: Step, first: float) -> None:
    """Refuse a loss that is `DIVERGED`.

    Raises:
        DivergenceError: it is.
    """
    if step.loss > DIVERGED * max(abs(first), 1.0):
        raise DivergenceError(
            f"the loss grew from {first:.4g} to {step.loss:.4g} by update "
            f"{step.step + 1}, in epoch {step.epoch + 1}."
        )


def advise_on_divergence(built: Built) -> str:
    """Say what to do about a run that diverges."""
    if raw := describe_raw_bytes(built.data):
        return f"It may be the data: {raw}"
    return (
        f"The learning rate was {built.optimizer.param_groups[0]['lr']:g}: try a lower "
        f"optimizer.lr, schedule.warm_up or optimizer.clip_norm."
    )


def describe_rest(folder: Path) -> str:
    """Say what a run that failed has left behind."""
    found = checkpoints.find_newest(folder / "checkpoints").checkpoint
    if found is not None:
        return f"The checkpoint after {found.step} updates is kept in {folder}."
    return (
        f"{folder} is kept with its records, but has no checkpoint yet. Remove it, or train into "
        f"another folder."
    )
