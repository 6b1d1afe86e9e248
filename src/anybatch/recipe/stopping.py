"""Early stopping, by a value on the monitored split.

best = the first epoch with the best value;    stop if the value reaches target,
                                               or epochs since best >= patience
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from anybatch.recipe.schema import StopSection

__all__ = ["Stopping"]


class Stopping:
    """Rules of [stop], and the values of the metric so far."""

    def __init__(self, section: StopSection, split: str = "held_out") -> None:
        self._section = section
        self._split = split.replace("_", "-")
        lower = section.better == "lower" or (section.better is None and section.metric == "loss")
        self._sign = -1.0 if lower else 1.0
        self._values: dict[int, float] = {}  # by epoch, ascending

    def note(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Note the figures after an epoch: the data loss and the metrics, by name."""
        self._values[epoch] = figures[cast(str, self._section.metric)]

    @property
    def best(self) -> tuple[int, float]:
        """Epoch, from 0, and its value: the best so far, and the earliest of equals."""
        return max(self._values.items(), key=lambda entry: (self._goodness(entry[1]), -entry[0]))

    @property
    def reason(self) -> str | None:
        """Reason to stop now; None: continue."""
        if not self._values:
            return None
        section, metric = self._section, self._section.metric
        target, patience = section.target, section.patience
        (epoch, value), (best, best_value) = list(self._values.items())[-1], self.best
        if target is not None and self._goodness(value) >= self._goodness(target):
            return f"{self._split} {metric} {value:.6g} has reached stop.target = {target:g}"
        if patience is not None and epoch - best >= patience:
            return (
                f"{self._split} {metric} has not been better than {best_value:.6g}, of epoch "
                f"{best + 1}, for stop.patience = {patience} epochs"
            )
        return None

    def _goodness(self, value: float) -> float:
        return -math.inf if math.isnan(value) else self._sign * value

    def state_dict(self) -> dict[str, Any]:
        """Return the values so far. All else follows from them and the recipe."""
        return {"values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the values that `state_dict` returned."""
        self._values = dict(state["values"])
