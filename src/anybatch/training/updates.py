"""Iterator over the updates of a training, with a length."""

from collections.abc import Callable, Generator, Iterator
from typing import final

from anybatch.training.step import Step

__all__ = ["Updates"]


@final
class Updates(Iterator[Step]):
    """Updates of a training, as `steps` returns them.

    Args:
        updates: makes an update at each step.
        count: counts the updates that are left.
        close: closes what was opened before the first update.
    """

    def __init__(
        self,
        updates: Generator[Step],
        count: Callable[[], int],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._updates, self._count, self._close = updates, count, close

    def __next__(self) -> Step:
        return next(self._updates)

    def __len__(self) -> int:
        """Return the number of updates from the present state on; for progress bars."""
        return self._count()

    def close(self) -> None:
        """End the training here, and close its run."""
        self._updates.close()
        self._close()
