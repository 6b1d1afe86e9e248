"""Random numbers of one part: seeded by its grain, or refused.

Without a key nothing may be drawn: the states of the global generators are compared after a part.
NumPy's and `random`'s take longer to compare, and are left out once an update has drawn nothing.
"""

from types import TracebackType

from anybatch.gradient.attempts import Drew
from anybatch.gradient.update import Update
from anybatch.layout import MicroBatch
from anybatch.randomness import GeneratorStates, seed_generators

__all__ = ["Draws"]


class Draws:
    """Seeds the generators for a grain, or sees to it that nothing is drawn."""

    def __init__(self, update: Update, part: MicroBatch) -> None:
        self._update = update
        self._states: GeneratorStates | None = None
        if update.key is not None and part.grain is not None:
            seed_generators(update.key.grain(part.grain), update.device)
            return
        is_quiet = update.facts.draws is False  # leaves NumPy and `random` alone
        self._states = GeneratorStates.capture(update.device, others=not is_quiet)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        update, states = self._update, self._states
        if states is None or (error is None and not states.has_changed(update.device)):
            return
        states.restore(update.device)
        if error is None:
            raise Drew
