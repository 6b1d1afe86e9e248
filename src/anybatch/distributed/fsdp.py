"""Models of which each rank holds a shard of every parameter: `fully_shard` (FSDP2).

    layer by layer    all_gather of the parameters -> forward or backward -> back to shards
    gradient          each of W ranks cuts its own in W slices -> all_to_all -> a rank has its slice
                      of all W -> combine -> `.grad`, a shard

torch's reduce-scatter sums the W slices in an order of its own and divides by W. Here the caller
combines them. A module that `fully_shard` was called on is a unit: its parameters are sent
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
from anybatch.distributed.collectives import all_gather_object, start_all_to_all
from anybatch.distributed.group import get_num_ranks, get_rank, translate_connection_errors

__all__ = [
    "drop_shards",
    "find_units",
    "gather_state",
    "gather_tensor",
    "gather_through_model",
    "is_fsdp_type",
    "is_sharded",
    "is_sharded_over",
    "replace_reduce_scatter",
    "shard_like",
    "shard_state_like",
]

T = TypeVar("T")
Combine = Callable[[int, Tensor], Tensor]  # a unit's number, [ranks, slice] -> [slice]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, without an import that takes a second."""
    return hasattr(tensor, "placements")


@lru_cache(maxsize=1024)
def is_fsdp_type(kind: Any) -> bool:
    """Return whether `fully_shard` made this module type."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def find_units(model: nn.Module) -> list[nn.Module]:
    """Return the modules that `fully_shard` was called on."""
    return [module for module in model.modules() if is_fsdp_type(module.__class__)]  # type: ignore


def is_sharded_over(tensor: Tensor, group: ProcessGroup) -> bool:
    """Return whether each rank of the group, by rank, holds one shard along one dimension."""
    if not is_sharded(tensor):
        return False
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    ranks = dist.get_process_group_ranks(group)
    return len(placements) == 1 and placements[0].is_shard() and mesh.mesh.tolist() == ranks


@torch.no_grad()
def gather_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank, a collective; return any other as it is."""
    if not is_sharded(tensor):
        return tensor
    with translate_connection_errors():
        return cast(Tensor, cast(Any, tensor).full_tensor())


def gather_state(state: Any, group: ProcessGroup | None) -> Any:
    """Gather each sharded tensor of a nested state on the first rank's CPU; None on other ranks."""

    def gather(tensor: Tensor) -> Tensor | None:
        full = gather_tensor(tensor)
        return full.cpu() if get_rank(group) == 0 else None

    return _map_sharded(gather, state)


def drop_shards(state: Any) -> Any:
    """Replace each sharded tensor of a nested state by None: the rest is equal on all ranks."""
    return _map_sharded(lambda tensor: None, state)


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharded as `like`; itself if that is not sharded."""
    if not is_sharded(like) or is_sharded(full):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    return distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)


def shard_state_like(state: Any, like: Any) -> Any:
    """Shard each tensor of a nested state, such as that of `gather_state`, as in another state."""
    if isinstance(like, dict) and isinstance(state, dict):
        return type(state)((k, shard_state_like(v, like.get(k))) for k, v in state.items())
    if isinstance(like, Tensor) and isinstance(state, Tensor):
        return shard_like(state, like)
    return state


@contextmanager
def replace_reduce_scatter(
    units: Sequence[nn.Module], combine: Combine, group: ProcessGroup
) -> Iterator[None]:
    """Make backward passes leave in `.grad` what `combine` computes from the ranks' gradients.

    Each unit keeps a custom reduce-scatter afterwards; it then does the same as torch's own.
    """
    for number, unit in enumerate(units):
        _set_combine(unit, number, combine, group)
    try:
        yield
    finally:
        for number, unit in enumerate(units):
            _set_combine(unit, number, None, group)


def gather_through_model(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Gather the results of `work` of all ranks, where it passes through a sharded model.

    An error inside `work` cannot be agreed upon, as `all_gather_object` does: the other ranks wait
    in a layer of the model. They fail when this rank ends.
    """
    try:
        result = work()
    except RuntimeError as error:  # of the connection, or the model's own
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        with translate_connection_errors(group):
            raise
    return all_gather_object(lambda: result, group)


def _set_combine(unit: Any, number: int, combine: Combine | None, group: ProcessGroup) -> None:
    """Let a unit combine gradients so; None: as torch does."""
    unit.set_gradient_divide_factor(None if combine is None else 1.0)
    if get_num_ranks(group) > 1:
        unit.set_custom_reduce_scatter(_make_reduce_scatter(number, combine))
        return

    def combine_alone(gradient: Tensor) -> None:  # one rank has no other to scatter to
        assert combine is not None
        gradient.copy_(combine(number, gradient.clone()[None]))

    unit.set_all_reduce_hook(None if combine is None else combine_alone)


def _make_reduce_scatter(number: int, combine: Combine | None) -> Any:
    class CombiningReduceScatter(find_reduce_scatter()):  # type: ignore[misc]
        """Reduce-scatter that gathers this rank's slices of all ranks and combines them."""

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
                return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)
            rows = start_all_to_all(input_tensor[None], [1] * get_num_ranks(group), group).wait()
            output_tensor.copy_(combine(number, rows))
            return None

    return CombiningReduceScatter()


def _map_sharded(function: Callable[[Tensor], Any], node: Any) -> Any:
    """Apply a function to each sharded tensor of a nested state."""
    if isinstance(node, dict):
        return type(node)((key, _map_sharded(function, child)) for key, child in node.items())
    if isinstance(node, list | tuple):
        return type(node)(_map_sharded(function, child) for child in node)
    return function(node) if isinstance(node, Tensor) and is_sharded(node) else node
