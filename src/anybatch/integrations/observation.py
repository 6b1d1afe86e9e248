"""Observe the updates of an unchanged trainer, for the callbacks of several trainers."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from anybatch.ledger import observe

__all__ = ["UpdateObserver"]


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
