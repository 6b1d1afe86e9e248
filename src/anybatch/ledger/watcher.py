"""What sees the calls in a loop of one's own, as `Intercept` hands them over."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Watcher"]


class Watcher(Protocol):
    """Sees calls of torch while a model is observed."""

    def is_watched(self, func: Any) -> bool:
        """Whether calls of a function are handed over."""

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that was handed over."""

    def met(self, operands: list[Tensor], run: Callable[[], Any]) -> Any:
        """Run an operation that takes parameters."""
