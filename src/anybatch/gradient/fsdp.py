"""The gradient of a model in shards (`fully_shard`): each rank ends with its slice of the sum.

    pass j    every rank: forward and backward of its part j, of nothing where it has fewer
              slices of all ranks' gradients -> added up, in the fixed tree where asked for

All ranks make as many passes, since in each they gather the parameters from one another. In the
tree a pass has a leaf of each rank:

    rank r, grains a_r .. b_r - 1  ->  its nodes, by slices  ->  S once the last pass is made

Where every rank has one grain, nothing is kept; otherwise each keeps the nodes of all ranks' runs
in its slices, log2(grains a rank) times the gradient of the whole model.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from anybatch import distributed, pytree
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import LayoutError, LedgerError, ModelError
from anybatch.gradient import pairwise_sum
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.pairwise_sum import Node
from anybatch.gradient.survey import Survey, survey_model
from anybatch.gradient.update import Idle, Update
from anybatch.layout import GrainRange, Layout, MicroBatch
from anybatch.ledger.ledger import Observe

__all__ = ["ShardedAccumulator", "check_asked", "idle", "surveyed"]

_NOT_ONCE = (
    "a module that fully_shard was called on has left a gradient twice in a pass, or in some "
    "passes only, expected once in each with bitwise=True, where it is a leaf of the fixed tree. "
    "Call fully_shard on the module around it instead, or leave bitwise out."
)
_IDLE = 2  # examples of a pass that counts for nothing: batch normalisation needs two


def surveyed(model: nn.Module, group: ProcessGroup | None) -> Survey:
    """The survey of any model; of one in shards, with all of its parameters in slices.

    Raises:
        ModelError: naming a parameter that is not in slices over the ranks of the group.
    """
    survey = survey_model(model)
    if not survey.units:
        return survey
    for unit in survey.units:  # a pass of the user's own may have left layers gathered
        unit.reshard()  # type: ignore[operator]
    survey = survey_model(model)
    if group is None:
        raise ModelError(
            "the model is in shards (fully_shard) and group is None, expected the ranks that hold "
            "it: pass group=, those of its device mesh."
        )
    for name, p in survey.parameters.items():
        if not fsdp.is_sharded_over(p, group):
            raise ModelError(
                f"{name} is not in slices over the {distributed.get_num_ranks(group)} ranks of the "
                f"group, expected every trainable parameter to be, in the group's order. Call "
                f"fully_shard(model, mesh=...) on the whole model last, without ignored_params, "
                f"with a mesh of one dimension over these ranks."
            )
        if p.dtype.itemsize < 4:
            raise ModelError(
                f"{name} is {p.dtype}, expected at least float32 in shards, in which gradients "
                f"are added up. Shard a float32 model, and pass precision='bfloat16'."
            )
    return survey


def check_asked(
    observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> None:
    """Refuse what a model in shards cannot be asked for."""
    if observe is not None or isinstance(clip, ClipExamples):
        raise LedgerError(
            "the model is in shards (fully_shard), in which no example's gradient is seen, "
            "expected neither observe= nor ClipExamples. Observe the model before it is sharded."
        )
    if layout.micro_batch == "auto":
        raise LayoutError(
            "micro_batch='auto' with a model in shards (fully_shard), expected a number of "
            "examples: a rank whose memory is short cannot try again while others wait for its "
            "part of the model."
        )


def idle(update: Update, passes: Sequence[int]) -> Idle | None:
    """What this rank goes through in the passes that others make and it has no part for.

    Args:
        passes: how many each rank has parts for.
    """
    missing = max(passes) - passes[distributed.get_rank(update.group)]
    size = min(_IDLE, update.place.stop - update.place.start)
    share = pytree.take_examples(update.share, 0, size) if size else None
    if 0 in passes:  # of what another has, where a rank has no example
        giver = next(rank for rank, number in enumerate(passes) if number)
        own = distributed.get_rank(update.group) == giver
        cpu = torch.device("cpu")
        told = distributed.all_gather_object(
            lambda: (size, pytree.prepare_batch(share, cpu)) if own else None, update.group
        )[giver]
        assert told is not None
        size, share = (size, share) if size else told
    return Idle(share, size, missing) if missing else None


class ShardedAccumulator(Accumulator):
    """Collects this rank's slices, as `combine` is given those of all."""

    def __init__(
        self,
        survey: Survey,
        passes: Sequence[int],
        runs: Sequence[GrainRange] | None,
        group: ProcessGroup,
    ) -> None:
        """Take how many parts each rank has, and its grains where they are added up by tree."""
        self._survey, self._passes, self._runs = survey, passes, runs
        super().__init__(survey.parameters, group)

    def clear(self) -> None:
        super().clear()
        self._pass = 0
        self._nodes: dict[int, list[list[Node[Tensor]]]] = {}  # by unit and rank
        self._gone_through: Counter[int] = Counter()  # units

    def going_back(self) -> AbstractContextManager[None]:
        assert self._group is not None
        return fsdp.replace_reduce_scatter(self._survey.units, self.combine, self._group)

    def add(self, part: MicroBatch) -> None:
        """One pass has been made, on all ranks."""
        self._pass += 1
        if self._runs is not None and self._pass < max(self._passes):
            self.discard()  # the tree is not complete: what a pass leaves is no sum
        else:
            super().add(part)

    def combine(self, unit: int, rows: Tensor) -> Tensor:
        """What a pass adds to `.grad`, from every rank's gradient [ranks, slice] of a unit."""
        here = [rank for rank, number in enumerate(self._passes) if self._pass < number]
        if self._runs is None:
            total = rows[here[0]]
            for rank in here[1:]:
                total = total.add_(rows[rank])
            return total
        if self._gone_through[unit] != self._pass:
            raise ModelError(_NOT_ONCE)
        self._gone_through[unit] += 1
        held = self._nodes.pop(unit, [[] for _ in self._passes])
        for rank in here:
            leaf = Node(self._runs[rank][0] + self._pass, 0, rows[rank])
            held[rank] = pairwise_sum.append_node(held[rank], leaf, Tensor.add_)
        if self._pass + 1 < max(self._passes):
            self._nodes[unit] = held
            return rows[0]  # anything: `add` takes it away
        return pairwise_sum.sum_nodes((node for nodes in held for node in nodes), Tensor.add_)

    def finish(self) -> None:
        if any(number != self._pass for number in self._gone_through.values()):
            raise ModelError(_NOT_ONCE)
        super().finish()

    def sum_over_ranks(self) -> None:
        """Nothing is left to be summed."""
