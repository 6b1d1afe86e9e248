"""Warning of weights that small batches cancel.

Mean divides a batch by its own sum of weights. Of examples whose weights vary, a mean over batches
is then off the mean over the data, by about

    cv^2 / B,    cv = standard deviation of the weights over their mean, B = examples of a batch
"""

import logging

import torch

from anybatch.gradient import Gradient
from anybatch.objective import Objective
from anybatch.reductions import Mean, Reduction, Scaled

__all__ = ["CountWatch"]

_NUM_UPDATES = 10  # that are looked at
_TOO_FAR = 0.02

_log = logging.getLogger(__name__)


class CountWatch:
    """Looks at the weights of the first updates, and warns once.

    Args:
        objective: its terms under Mean without a total are watched.
    """

    def __init__(self, objective: Objective) -> None:
        reductions = objective.reductions.items()
        self._counts = {name: torch.zeros(0) for name, r in reductions if _divides_by_own(r)}
        self._num_left = _NUM_UPDATES

    def note(self, gradient: Gradient) -> None:
        """Look at the weights of one update on this rank; whole numbers are counts of terms."""
        if not self._num_left or not self._counts:
            return
        self._num_left -= 1
        for name, before in list(self._counts.items()):
            counts = gradient.terms[name].counts
            if counts is None or not counts.is_floating_point():
                del self._counts[name]
                continue
            self._counts[name] = own = torch.cat([before, counts.detach().float().cpu()])
            mean = float(own.mean())
            share = float(own.var(correction=0)) / mean**2 / gradient.num_examples if mean else 0
            if share > _TOO_FAR and not bool((own == own.round()).all()):
                self._num_left = 0
                _log.warning(_WARNING, name, gradient.num_examples, share)


def _divides_by_own(reduction: Reduction) -> bool:
    while isinstance(reduction, Scaled):
        reduction = reduction.reduction
    return isinstance(reduction, Mean) and reduction.total is None


_WARNING = (
    "The weights of the term %r vary, and a batch has only %d examples. Mean() divides each batch "
    "by its own sum of weights, so their effect fades as batches get smaller (by about %.2g here). "
    "Use ab.Mean(total=weights.mean().item()), with the mean weight of all training data: its "
    "result does not depend on the batch size."
)
