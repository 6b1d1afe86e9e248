"""Observe the updates of several trainers: an unchanged one, or one with the exact gradient."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from anybatch.gradient import Gradient, batch_gradient
from anybatch.ledger import Observe, observe
from anybatch.objective import Objective
from anybatch.pytree import MicroBatches
from anybatch.training.spike_finder import SpikeFinder
from anybatch.training.spikes import Spike

__all__ = ["UpdateObserver", "compute_and_watch"]


def compute_and_watch(
    finder: SpikeFinder | None,
    step: int,
    model: nn.Module,
    objective: Objective,
    share: MicroBatches,
    *,
    observe: Observe | None,
    scaler: Any,
    **how: Any,
) -> tuple[Gradient, Spike | None]:
    """Compute the gradient of an update, and find out whether it is a spike.

    Args:
        finder: None: spikes are not watched.
        scaler: `GradScaler` of the trainer, or None.
        how: further arguments of `batch_gradient`.
    """
    compute = partial(batch_gradient, model, objective, share, scaler=scaler, **how)
    if finder is None:
        return compute(observe=observe), None
    scale = 1.0 if scaler is None else scaler.get_scale()
    return finder.compute_and_inspect(
        step, compute, model, objective, share, observe=observe, scale=scale
    )


class UpdateObserver:
    """Observes a model from the first forward pass of an update to its last backward pass."""

    def __init__(self) -> None:
        self.ledger: Any = None
        self._context: AbstractContextManager[Any] | None = None
        self._next_ledger: Any = None  # of the update that is observed

    @property
    def norms(self) -> Tensor | None:
        """Norms of the last update; None before the first."""
        return None if self.ledger is None else self.ledger.norms

    def _begin(self, model: nn.Module) -> None:
        """Begin to observe, unless this update is observed already."""
        if self._context is None:
            self._context = observe(model)
            self._next_ledger = self._context.__enter__()

    def _complete(self) -> None:
        """End the observation, and keep its ledger."""
        if self._context is not None:
            self._stop()
            self.ledger = self._next_ledger

    def _stop(self, error: BaseException | None = None) -> None:
        """End the observation of an update that was left or has failed."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None if error is None else type(error), error, None)
