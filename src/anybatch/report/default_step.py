"""The step that a page shows if nobody names one.

The first step at which the data loss has fallen half of its way. Some examples are learned by then
and others are not, so their losses and gradients differ. After the end of a run they hardly do.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

__all__ = ["Rows", "choose_step", "data_loss", "seconds_to_reach"]

PATIENCE = 15.0
"""Seconds that replaying may take, if nobody has asked for a step."""

WINDOW = 5
"""Updates over which the loss is averaged, since single batches differ."""

Rows = Sequence[Mapping[str, Any]]


def choose_step(
    rows: Rows, penalties: Sequence[str], checkpoints: Sequence[int]
) -> tuple[int, str] | None:
    """Choose a step that shows something, and say why.

    Args:
        rows: the records of the run.
        penalties: names of the parts of the loss that are penalties.
        checkpoints: the steps that the run can be taken up at without a wait.

    Returns:
        The step and the reason, in a sentence or two; None if nothing is recorded.
    """
    made = [row for row in rows if row["kind"] == "step" and not row.get("skipped")]
    known = {row["step"]: data_loss(row["parts"], penalties) for row in made}
    losses = {step: loss for step, loss in known.items() if loss is not None}
    if not losses:
        return None
    steps = list(losses)
    means = _moving_means(list(losses.values()))
    half = (means[0] + min(means)) / 2
    wanted = next((k for k, mean in enumerate(means) if mean <= half), 0)
    if wanted == 0:
        wanted = len(steps) // 10
    seconds = seconds_to_reach(rows, checkpoints)
    quick = [k for k, step in enumerate(steps) if seconds(step) <= PATIENCE] or [0]
    place = min(quick, key=lambda k: abs(k - wanted))
    is_half = place == wanted and place > 0 and means[place] <= half
    where = "about half of the way" if is_half else "early in the run"
    if place != wanted:
        where = "the one closest to half of the way that is quick to make again"
    reason = (
        f"It is shown because it is {where}: averaged over {WINDOW} steps, the data loss begins "
        f"at {means[0]:.3g}, is {means[place]:.3g} here, and {min(means):.3g} at its lowest."
    )
    if is_half:
        reason += " So some examples are learned and others are not."
    return steps[place], reason


def data_loss(parts: Mapping[str, float | None], penalties: Sequence[str]) -> float | None:
    """Add up the parts of a loss that are no penalty; None if one of them is not finite."""
    values = [value for name, value in parts.items() if name not in penalties]
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None


def seconds_to_reach(rows: Rows, checkpoints: Sequence[int]) -> Callable[[int], float]:
    """Return a function that estimates how long replaying up to a step takes, by the records."""
    seconds = {row["step"]: row["seconds"] or 0.0 for row in rows if row["kind"] == "step"}
    steps, starts = sorted(seconds), sorted({0, *checkpoints})
    times = [0.0, *accumulate(float(seconds[step]) for step in steps)]
    mean = times[-1] / len(steps) if steps else 0.0

    def estimate(step: int) -> float:
        start = max(one for one in starts if one <= step)
        first, last = bisect_left(steps, start), bisect_left(steps, step)
        unknown = step - start - (last - first)  # updates without a row
        return times[last] - times[first] + mean * unknown

    return estimate


def _moving_means(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, k + 1 - WINDOW) : k + 1] for k in range(len(values))]
    return [sum(window) / len(window) for window in windows]
