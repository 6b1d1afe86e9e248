"""Which part of each batch a rank reads.

    share of rank r of W  =  grains  floor(r G / W) .. floor((r + 1) G / W) - 1  of the batch's G

a run of examples, of whole grains where the objective has any: where there are fewer than
ranks, some shares are empty. The grains are those of `layout.grains`.
"""

import logging
from dataclasses import dataclass, replace

from torch import nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.gradient.survey import find_grain_reason
from anybatch.objective import Objective

__all__ = ["Share", "evenly", "share_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part of every batch, as a function of the number of examples in it."""

    rank: int
    num_ranks: int
    grain: int | None  # examples that stay together; None: the whole batch

    def __call__(self, num_examples: int) -> slice:
        """Where this rank's share of so many examples lies."""
        size = num_examples if self.grain is None else self.grain
        grains, ragged = divmod(num_examples, size)
        if ragged >= min(2, size) or grains == 0:  # a single example joins its neighbour
            grains += 1
        cuts = [(self.rank + i) * grains // self.num_ranks for i in (0, 1)]
        start, stop = (num_examples if cut == grains else cut * size for cut in cuts)
        return slice(start, stop)


def evenly(group: ProcessGroup | None) -> Share:
    """This rank's part of things that may be cut anywhere."""
    return Share(rank=distributed.rank_of(group), num_ranks=distributed.num_ranks(group), grain=1)


def share_of(
    model: nn.Module, objective: Objective, group: ProcessGroup | None, *, bitwise: bool = False
) -> Share | None:
    """This rank's part of every batch; None: all of it.

    Without a grain a batch may be cut anywhere if the model neither draws random numbers nor
    couples examples, and nowhere if it does, or if the bits are to be the same.
    """
    if group is None:
        return None
    told = distributed.everywhere(lambda: find_grain_reason(model, objective.example_losses), group)
    why = next((reason for reason in told if reason is not None), None)
    if bitwise and why is None:
        why = "bitwise=True adds up grains in a fixed order"
    share = evenly(group)
    if objective.grain is not None or why is not None:
        share = replace(share, grain=objective.grain)
    if share.grain is None and share.num_ranks > 1 and share.rank == 0:
        _log.warning(
            "%s, and without a grain the whole batch is one: one of %d ranks computes, and the "
            "others wait. Declare Objective(grain=...), a number of examples; it is part of the "
            "objective, since the examples of a grain share their random numbers and statistics.",
            why,
            share.num_ranks,
        )
    return share
