"""Gradient of a sharded model (FSDP2, `fully_shard`): each rank ends with its slice of the sum.

    pass j    every rank: forward and backward of its micro-batch j, or a dummy if it has fewer
              slices of all ranks' gradients -> added up, pairwise if requested

All ranks make equally many passes, since in each they gather the parameters from one another. In
the pairwise sum a pass gives one leaf per rank:

    rank r, grains a_r .. b_r - 1  ->  its nodes, by slices  ->  S once the last pass is made

If every rank has one grain, nothing is stored. Otherwise each rank stores its slices of all ranks'
nodes: log2(grains per rank) times the gradient of the whole model.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import LayoutError, LedgerError, ModelError
from anybatch.gradient import pairwise_sum
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.pairwise_sum import Node
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.survey import Facts, Survey, survey_update
from anybatch.gradient.update import PaddingPasses, Update
from anybatch.layout import GrainRange, Layout, MicroBatch
from anybatch.ledger.ledger import Observe
from anybatch.pytree import list_sizes, prepare_batch, take_few

__all__ = ["ShardedAccumulator", "check_options", "plan_padding", "survey_shards"]

_NOT_ONCE = (
    "A module that fully_shard was called on has left a gradient twice in a pass, or in some "
    "passes only. With bitwise=True it must leave one in each pass, where it is a leaf of the "
    "fixed tree. Call fully_shard on the module around it instead, or leave bitwise out."
)
_PADDING_SIZE = 2  # examples of a dummy pass: batch normalisation needs two


def survey_shards(
    model: nn.Module,
    example_losses: Callable[..., Any],
    survey: Survey,
    group: ProcessGroup | None,
) -> tuple[Survey, Facts]:
    """Survey a sharded model again, with all of its parameters in slices; see `survey_update`.

    Raises:
        ModelError: it names a parameter that is not in slices over the ranks of the group.
    """
    for unit in survey.units:  # a pass of the user's code may have left layers gathered
        unit.reshard()  # type: ignore[operator]
    survey, facts = survey_update(model, example_losses)
    if group is None:
        raise ModelError(
            "The model is sharded (fully_shard), and group is None. Pass group=, the ranks of its "
            "device mesh."
        )
    for name, p in survey.parameters.items():
        if not fsdp.is_sharded_over(p, group):
            raise ModelError(
                f"{name} is not in slices over the {distributed.get_num_ranks(group)} ranks of the "
                f"group. Every trainable parameter must be, in the group's order. Call "
                f"fully_shard(model, mesh=...) on the whole model last, without ignored_params, "
                f"with a mesh of one dimension over these ranks."
            )
        if p.dtype.itemsize < 4:
            raise ModelError(
                f"{name} is {p.dtype}. A sharded parameter must be at least float32, since "
                f"gradients are added up in its type. Shard a float32 model, and pass "
                f"precision='bfloat16'."
            )
    return survey, facts


def check_options(
    observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> None:
    """Refuse options that a sharded model does not support."""
    if observe is not None or isinstance(clip, ClipExamples):
        raise LedgerError(
            "The model is sharded (fully_shard), so no rank sees a whole gradient of an example. "
            "observe= and ClipExamples need one. Observe the model before it is sharded."
        )
    if layout.micro_batch == "auto":
        raise LayoutError(
            "micro_batch is 'auto', and the model is sharded (fully_shard). Pass a number of "
            "examples: a rank that runs out of memory cannot try again while others wait for its "
            "slice of the model."
        )


def plan_padding(update: Update, num_passes: Sequence[int]) -> PaddingPasses | None:
    """Plan the dummy passes of this rank; None: it needs none.

    Args:
        num_passes: number of micro-batches of each rank.
    """
    rank = distributed.get_rank(update.group)
    num_missing = max(num_passes) - num_passes[rank]
    size = min(_PADDING_SIZE, *(list_sizes(update.share) or (update.share_range.size,)))
    share = take_few(update.share, size) if size else None
    if 0 in num_passes:  # a rank without examples uses those of another
        source = next(r for r, number in enumerate(num_passes) if number)
        cpu = torch.device("cpu")
        examples = distributed.all_gather_object(
            lambda: (size, prepare_batch(share, cpu)) if rank == source else None, update.group
        )[source]
        assert examples is not None
        size, share = (size, share) if size else examples
    return PaddingPasses(share, size, num_missing) if num_missing else None


class ShardedAccumulator(Accumulator):
    """Sum of this rank's slices, which `combine` computes from those of all ranks.

    Args:
        num_passes: number of micro-batches of each rank.
        ranges: the grains of each rank, if they are summed pairwise.
    """

    def __init__(
        self,
        survey: Survey,
        num_passes: Sequence[int],
        ranges: Sequence[GrainRange] | None,
        group: ProcessGroup,
    ) -> None:
        self._survey, self._num_passes, self._ranges = survey, num_passes, ranges
        super().__init__(survey.parameters, group)
        self.clear()

    def clear(self) -> None:
        super().clear()
        self._pass = 0
        self._nodes: dict[int, list[list[Node[Tensor]]]] = {}  # by unit and rank
        self._passes_of_unit: Counter[int] = Counter()

    def backward_passes(self) -> AbstractContextManager[None]:
        assert self._group is not None
        return fsdp.replace_reduce_scatter(self._survey.units, self.combine, self._group)

    def add(self, micro_batch: MicroBatch) -> None:
        """Finish one pass, on all ranks."""
        self._pass += 1
        if self._ranges is not None and self._pass < max(self._num_passes):
            self.discard()  # the tree is not complete, so `.grad` holds no sum yet
        else:
            super().add(micro_batch)

    def combine(self, unit: int, rows: Tensor) -> Tensor:
        """Combine every rank's gradient [ranks, slice] of a unit to what is added to `.grad`."""
        ranks = [rank for rank, number in enumerate(self._num_passes) if self._pass < number]
        if self._ranges is None:
            total = rows[ranks[0]]
            for rank in ranks[1:]:
                total = total.add_(rows[rank])
            return total
        if self._passes_of_unit[unit] != self._pass:
            raise ModelError(_NOT_ONCE)
        self._passes_of_unit[unit] += 1
        nodes = self._nodes.pop(unit, [[] for _ in self._num_passes])
        for rank in ranks:
            leaf = Node(self._ranges[rank][0] + self._pass, 0, rows[rank])
            nodes[rank] = pairwise_sum.append_node(nodes[rank], leaf, Tensor.add_)
        if self._pass + 1 < max(self._num_passes):
            self._nodes[unit] = nodes
            return rows[0]  # any value: `add` discards it
        in_order = (node for rank_nodes in nodes for node in rank_nodes)
        return pairwise_sum.sum_nodes(in_order, Tensor.add_)

    def finish(self) -> None:
        if any(number != self._pass for number in self._passes_of_unit.values()):
            raise ModelError(_NOT_ONCE)
        super().finish()

    def sum_over_ranks(self) -> None:
        """Do nothing: `combine` has summed over ranks."""
