"""Loss scale for float16, found by trial.

    s <- s / 2    after an update whose gradient is not finite, which is skipped
    s <- 2 s      after `every` updates in a row whose gradient is finite

s is a power of two: it changes no bit of a gradient that neither underflows nor overflows.

Source: Micikevicius et al. 2018, 1710.03740, section 3.2; constants of torch's GradScaler.
"""

import math
from collections.abc import Mapping
from typing import Any, final

from anybatch.errors import DivergenceError
from anybatch.precision import Precision, check_precision

__all__ = ["LossScale"]

_MAX_SKIPPED = 32  # in a row: from 2^16 down to 2^-16


@final
class LossScale:
    """Loss scale of a training in float16, as `steps` uses it; a constant 1 in other precisions.

    For a loop of one's own: pass `value` to `batch_gradient` as `loss_scale`, and note after each
    update whether its gradient was finite. Save it by `state_dict`.

        >>> import torch
        >>> import anybatch as ab
        >>> scale = ab.LossScale()
        >>> scale.note(is_finite=False)  # `gradient.is_finite`: leave this update out
        >>> scale.value
        32768.0

    Args:
        precision: as for `batch_gradient`.
        every: updates in a row with finite gradients before the scale doubles.
    """

    def __init__(self, precision: Precision = "float16", *, every: int = 2000) -> None:
        check_precision(precision)
        self.value = 2.0**16 if precision == "float16" else 1.0
        self._is_constant = precision != "float16"
        self._every = every
        self._finite_in_a_row = 0
        self._skipped_in_a_row = 0

    def note(self, is_finite: bool, *, step: int | None = None) -> None:
        """Adapt the scale to whether the gradient of an update was finite.

        Args:
            is_finite: `gradient.is_finite`.
            step: of the update, for the message of an error.

        Raises:
            DivergenceError: too many gradients in a row were not finite.
        """
        self._finite_in_a_row = self._finite_in_a_row + 1 if is_finite else 0
        self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MAX_SKIPPED:
            last = "" if step is None else f", up to step {step},"
            raise DivergenceError(
                f"the gradients of {_MAX_SKIPPED} updates in a row{last} were not "
                f"finite, although their losses were. Either a derivative is infinite (sqrt or log "
                f"at 0?), or the weights have left the range of the precision."
            )
        if self._is_constant:
            return
        if not is_finite:
            self.value /= 2
        elif self._finite_in_a_row % self._every == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return all that later scales depend on."""
        return {
            "value": self.value,
            "finite_in_a_row": self._finite_in_a_row,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` has returned."""
        value = float(state["value"])
        if not 0 < value < math.inf:
            raise ValueError(f"the loss scale is {value}, and must be a positive number.")
        self._finite_in_a_row = int(state["finite_in_a_row"])
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        self.value = value
