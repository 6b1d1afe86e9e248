"""AdaScale: a learning rate that grows with the batch only as far as noise allows.

    r = (s2 + m2) / (s2 / k + m2),    1 <= r <= k
    rate of update t = r * schedule(b * floor(tau)),    tau <- tau + r

k is the batch size over the reference size b; s2 = tr(S) / b the variance of the gradient of a
reference batch, m2 = |G|^2, both averaged over the updates so far. Where noise outweighs the
gradient r is k, the linear rule; where it does not, r is 1, and larger batches gain nothing. tau
counts the updates that a run at the reference size would have made.

Averages are plain means over the first 1 / (1 - theta) updates, and then a <- theta a +
(1 - theta) x, with theta = max(1 - k / 1000, 0). Departing from the source, r is that of the
updates before: the rate of an update then does not depend on its own gradient's noise.
"""

from collections.abc import Mapping
from typing import Any, final

from anybatch.batch import is_count
from anybatch.errors import LedgerError, RecipeError
from anybatch.gradient import Gradient
from anybatch.schedules import Schedule

__all__ = ["AdaScale"]


@final
class AdaScale:
    """A schedule at a reference batch size, carried to another by the noise that is measured.

    To be called as a schedule, and told of each update in the loop:

        rate = AdaScale(Constant(0.1), reference_size=64, batch_size=512)
        how = {"schedule": rate, "observe": ab.Observe(noise_scale=True), "state": {"rate": rate}}
        for step in ab.steps(..., **how):
            rate.update(step.gradient)

    For SGD with or without momentum, under Mean, and where the noise scale is defined: neither
    batch normalisation nor `ClipExamples`. No warm-up is needed.

    Args:
        schedule: the learning rate at the reference size, by the examples used there.
        reference_size: examples of an update there.
        batch_size: examples of an update here, at least as many.

    Raises:
        RecipeError: sizes out of their range, or no schedule.

    Source: Johnson et al. 2020, 2007.05105, algorithm 1; averages in appendix B.3.
    """

    def __init__(self, schedule: Schedule, *, reference_size: int, batch_size: int) -> None:
        if not callable(schedule):
            raise RecipeError(f"AdaScale expects a schedule such as Constant(0.1), got {schedule}.")
        for name, size in (("reference_size", reference_size), ("batch_size", batch_size)):
            if not is_count(size):
                raise RecipeError(
                    f"AdaScale expects {name} to be a number of examples of at least 1, got "
                    f"{size!r}."
                )
        if batch_size < reference_size:
            raise RecipeError(
                f"AdaScale expects a batch_size of at least reference_size = {reference_size}, got "
                f"{batch_size}: the variance of a batch does not tell that of a part of it which "
                f"gains nothing. Use the linear rule."
            )
        self._schedule = schedule
        self._size, self._reference = batch_size, reference_size
        self._progress = 0.0  # tau
        self._num_seen = 0
        self._variance = self._square = 0.0  # averages of tr(S) and |G|^2

    def __call__(self, examples: int) -> float:
        """The rate of the next update; the examples used here do not matter."""
        return self.gain * self._schedule(self.examples)

    @property
    def gain(self) -> float:
        """r of the next update, from 1 to k; 1 before anything is known."""
        noise, signal = max(self._variance, 0.0) / self._reference, max(self._square, 0.0)
        if not noise + signal > 0:
            return 1.0
        return (noise + signal) / (noise * self._reference / self._size + signal)

    @property
    def examples(self) -> int:
        """What a run at the reference size would have used by now."""
        return self._reference * int(self._progress)

    def update(self, gradient: Gradient) -> None:
        """Take in an update that has been made; one that was skipped is none.

        Raises:
            LedgerError: its noise was not observed.
        """
        if not gradient.is_finite:
            return
        if gradient.ledger is None or gradient.ledger.noise is None:
            raise LedgerError(
                "AdaScale was told of an update whose noise was not observed, expected "
                "steps(..., observe=ab.Observe(noise_scale=True))."
            )
        self._progress += self.gain
        self._num_seen += 1
        share = max(1 / self._num_seen, min(self._size / self._reference / 1000, 1.0))
        noise = gradient.ledger.noise
        self._variance += share * (noise.variance - self._variance)
        self._square += share * (noise.gradient_square - self._square)

    def __repr__(self) -> str:
        """What it was made of, and nothing that changes."""
        sizes = f"reference_size={self._reference}, batch_size={self._size}"
        return f"AdaScale({self._schedule!r}, {sizes})"

    def state_dict(self) -> dict[str, Any]:
        """All that later rates depend on."""
        return {
            "progress": self._progress,
            "num_seen": self._num_seen,
            "variance": self._variance,
            "square": self._square,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` has given."""
        self._progress, self._num_seen = float(state["progress"]), int(state["num_seen"])
        self._variance, self._square = float(state["variance"]), float(state["square"])
