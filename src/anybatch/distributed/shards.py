"""Models in shards: `fully_shard` has cut every parameter, and each rank holds a slice (FSDP2).

    layer by layer    all_gather of the parameters -> forward, or backward -> slices again
    gradient          of each of W ranks, in W slices -> all_to_all -> a rank has its slice of all W
                      -> combine -> `.grad`, a slice

torch's reduce-scatter adds the W up in an order of its own and divides by W; here the caller says
what becomes of them. A module that `fully_shard` was called on is a unit: its parameters travel
together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from anybatch._torch import find_reduce_scatter
from anybatch.distributed.connection import connected, num_ranks, rank_of
from anybatch.distributed.messages import everywhere, slices

__all__ = [
    "combined",
    "cut_alike",
    "cut_like",
    "gathered",
    "is_sharded",
    "is_unit",
    "lies_over",
    "replicated",
    "through_layers",
    "units",
    "whole",
]

T = TypeVar("T")
Combine = Callable[[int, Tensor], Tensor]  # a unit's number, [ranks, slice] -> [slice]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without an import that takes a second."""
    return hasattr(tensor, "placements")


@lru_cache(maxsize=1024)
def is_unit(kind: Any) -> bool:
    """Whether `fully_shard` has made modules of this type."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was called on."""
    return [module for module in model.modules() if is_unit(module.__class__)]  # type: ignore


def lies_over(tensor: Tensor, group: ProcessGroup) -> bool:
    """Whether its slices, along one dimension, are on the ranks of the group, in their order."""
    if not is_sharded(tensor):
        return False
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    ranks = dist.get_process_group_ranks(group)
    return len(placements) == 1 and placements[0].is_shard() and mesh.mesh.tolist() == ranks


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of it on every rank, if it is in slices; collective then."""
    if not is_sharded(tensor):
        return tensor
    with connected():
        return cast(Tensor, cast(Any, tensor).full_tensor())


def gathered(state: Any, group: ProcessGroup | None) -> Any:
    """A nested state with the whole of each tensor in slices on the first rank's CPU, and None in
    its place elsewhere."""

    def kept(tensor: Tensor) -> Tensor | None:
        every = whole(tensor)
        return every.cpu() if rank_of(group) == 0 else None

    return _mapped(kept, state)


def replicated(state: Any) -> Any:
    """A nested state without what is in slices: what every rank holds all of."""
    return _mapped(lambda tensor: None, state)


def cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of a tensor that all have, as that of another; itself if that is whole."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def cut_alike(state: Any, like: Any) -> Any:
    """A nested state, such as `gathered` has made of another, in slices where that is."""
    if isinstance(like, dict) and isinstance(state, dict):
        return type(state)((k, cut_alike(v, like.get(k))) for k, v in state.items())
    if isinstance(like, Tensor) and isinstance(state, Tensor):
        return cut_like(state, like)
    return state


@contextmanager
def combined(units: Sequence[nn.Module], combine: Combine, group: ProcessGroup) -> Iterator[None]:
    """Backward passes leave in `.grad` what `combine` makes of the ranks' gradients.

    A custom reduce-scatter of a unit stays, and does as torch's own does once this is left.
    """
    for number, unit in enumerate(units):
        _set(unit, number, combine, group)
    try:
        yield
    finally:
        for number, unit in enumerate(units):
            _set(unit, number, None, group)


def through_layers(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """What `work()` returns on every rank, in order, where it goes through a model in shards.

    An error in its midst is not agreed upon, as by `everywhere`: the others wait in its layers, and
    hear of it once this rank has left.
    """
    try:
        result = work()
    except RuntimeError as error:  # of the connection, or the model's own
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        with connected(group):
            raise
    return everywhere(lambda: result, group)


def _set(unit: Any, number: int, combine: Combine | None, group: ProcessGroup) -> None:
    """Give a unit its way to sum, or with None torch's own."""
    unit.set_gradient_divide_factor(None if combine is None else 1.0)
    if num_ranks(group) > 1:
        unit.set_custom_reduce_scatter(_scatter(number, combine))
        return

    def alone(gradient: Tensor) -> None:  # one rank has nobody to scatter to
        assert combine is not None
        gradient.copy_(combine(number, gradient.clone()[None]))

    unit.set_all_reduce_hook(None if combine is None else alone)


def _scatter(number: int, combine: Combine | None) -> Any:
    class Scatter(find_reduce_scatter()):  # type: ignore[misc]
        """Every rank's slice for this one, combined."""

        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        def __call__(
            self,
            output_tensor: Tensor,
            input_tensor: Tensor,
            group: ProcessGroup,
            op: Any,
            async_op: bool = False,
        ) -> Any:
            if combine is None:
                how = {"op": op, "group": group, "async_op": async_op}
                return dist.reduce_scatter_tensor(output_tensor, input_tensor, **how)
            rows = slices(input_tensor[None], [1] * num_ranks(group), group).wait()
            output_tensor.copy_(combine(number, rows))
            return None

    return Scatter()


def _mapped(function: Callable[[Tensor], Any], node: Any) -> Any:
    """A nested state with each tensor in slices replaced."""
    if isinstance(node, dict):
        return type(node)((key, _mapped(function, child)) for key, child in node.items())
    if isinstance(node, list | tuple):
        return type(node)(_mapped(function, child) for child in node)
    return function(node) if isinstance(node, Tensor) and is_sharded(node) else node
