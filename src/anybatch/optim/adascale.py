"""AdaScale: a learning rate that grows with the batch size as far as gradient noise allows.

    r = (s2 + m2) / (s2 / k + m2),    1 <= r <= k
    rate of update t = r * schedule(b * floor(tau)),    tau <- tau + r

k is the batch size over the reference size b; s2 = tr(S) / b the variance of the gradient of a
reference batch, m2 = |G|^2, both averaged over the updates so far. If noise dominates the gradient,
r is k, the linear rule; if the gradient dominates, r is 1, and larger batches gain nothing. tau
counts the updates that a run at the reference size would have made.

Averages are plain means over the first 1 / (1 - theta) updates, and then a <- theta a +
(1 - theta) x, with theta = max(1 - k / 1000, 0). Departing from the source, r comes from earlier
updates only, so that the rate of an update does not depend on the noise of its own gradient.
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
    """A schedule that scales a reference schedule to a larger batch by the measured noise.

        >>> import anybatch as ab
        >>> rate = ab.AdaScale(ab.Constant(0.1), reference_size=64, batch_size=512)
        >>> rate(0)  # the rate of the first update, before any noise is measured
        0.1
        >>> how = {"schedule": rate, "state": {"rate": rate}}
        >>> how["observe"] = ab.Observe(noise_scale=True)
        >>> # for step in ab.steps(..., **how):
        >>> #     rate.update(step.gradient)

    For SGD with or without momentum, with Mean, and where the noise scale is defined: no batch
    normalisation, no `ClipExamples`. No warm-up is needed.

    Args:
        schedule: learning rate at the reference size, as a function of the examples used there.
        reference_size: examples of an update there.
        batch_size: examples of an update here, at least as many.

    Raises:
        RecipeError: a size is out of range, or there is no schedule.

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
                f"{batch_size}. It scales to larger batches only. Use the linear rule."
            )
        self._schedule = schedule
        self._size, self._reference = batch_size, reference_size
        self._progress = 0.0  # tau
        self._num_updates = 0
        self._variance = self._square = 0.0  # averages of tr(S) and |G|^2

    def __call__(self, examples: int) -> float:
        """Return the rate of the next update; the examples used here do not matter."""
        return self.gain * self._schedule(self.examples)

    @property
    def gain(self) -> float:
        """r of the next update, from 1 to k; 1 before the first."""
        noise, signal = max(self._variance, 0.0) / self._reference, max(self._square, 0.0)
        if not noise + signal > 0:
            return 1.0
        return (noise + signal) / (noise * self._reference / self._size + signal)

    @property
    def examples(self) -> int:
        """Number of examples that a run at the reference size would have used."""
        return self._reference * int(self._progress)

    def update(self, gradient: Gradient) -> None:
        """Measure the noise of an update; a skipped update does not count.

        Raises:
            LedgerError: its noise was not observed.
        """
        if not gradient.is_finite:
            return
        if gradient.ledger is None or gradient.ledger.noise is None:
            raise LedgerError(
                "AdaScale.update got a gradient whose noise was not observed. Pass "
                "steps(..., observe=ab.Observe(noise_scale=True))."
            )
        self._progress += self.gain
        self._num_updates += 1
        weight = max(1 / self._num_updates, min(self._size / self._reference / 1000, 1.0))
        noise = gradient.ledger.noise
        self._variance += weight * (noise.variance - self._variance)
        self._square += weight * (noise.gradient_square - self._square)

    def __repr__(self) -> str:
        """Show the arguments, and nothing that changes: a run compares it on resume."""
        sizes = f"reference_size={self._reference}, batch_size={self._size}"
        return f"AdaScale({self._schedule!r}, {sizes})"

    def state_dict(self) -> dict[str, Any]:
        """Return all that later rates depend on."""
        return {
            "progress": self._progress,
            "num_seen": self._num_updates,
            "variance": self._variance,
            "square": self._square,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` has returned."""
        self._progress, self._num_updates = float(state["progress"]), int(state["num_seen"])
        self._variance, self._square = float(state["variance"]), float(state["square"])
