"""Optimiser whose state is sharded over the ranks (ZeRO, stage 1).

    rank r of W owns  floor(r n / W) .. floor((r + 1) n / W) - 1  of the n weights in a row
    G on every rank -> each updates its own weights with its own state -> all_gather of the weights

An element-wise optimiser computes the same bits on a slice as on the whole. So a run is the same
with and without sharding, and checkpoints hold the whole state. State and time of the update are
1/W. `.grad` stays whole for penalties, clipping and the ledger, so n (W - 1)/W more elements are
sent than the gradient's 2 n (W - 1)/W.

Source: Rajbhandari et al. 2020, ZeRO, 1910.02054, P_os.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import ModelError

__all__ = ["ShardedOptimizer", "check_elementwise"]

State = dict[str, Any]


class _Slice(NamedTuple):
    """A rank's slice of a parameter, which may be all of it."""

    place: int  # of the parameter, over all groups
    start: int
    stop: int  # elements of the flat parameter
    values: nn.Parameter  # [stop - start]


class ShardedOptimizer:
    """Replaces an optimiser and shards its state; all methods are collective.

    Args:
        optimizer: holds the whole state so far, which is taken from it. Its groups still set
            learning rates and other options.

    Raises:
        ModelError: the optimiser is not element-wise.
    """

    def __init__(self, optimizer: Optimizer, group: ProcessGroup) -> None:
        distributed.call_together(lambda: check_elementwise(optimizer), group)
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self._group = group
        self._parameters = [p for options in self.param_groups for p in options["params"]]
        self._slices: list[_Slice] = []
        self._local = _copy_empty(optimizer, [])  # updates the slices of this rank
        self._take_slices(optimizer.state)
        optimizer.state.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their `.grad`."""
        distributed.call_together(self._update_slices, self._group)
        for dtype, row in self._join_slices():
            parameters = [p for p in self._parameters if p.dtype == dtype]
            sizes = [p.numel() for p in parameters]
            counts = _count_elements(sum(sizes), self._group)
            weights = distributed.all_gather_vectors(row, counts, self._group)
            for p, new in zip(parameters, torch.split(weights, sizes), strict=True):
                p.copy_(new.view(p.shape))

    def state_dict(self) -> State:
        """Return the state that an unsharded optimiser would have, on the CPU."""
        per_rank = distributed.all_gather_object(self._copy_state, self._group)
        state: dict[int, State] = {}
        for index, p in enumerate(self._parameters):
            slices = [s for states in per_rank if (s := states.get(index)) is not None]
            if slices and slices[0]:
                state[index] = {key: _join_values(key, slices, p) for key in slices[0]}
        indices = iter(range(len(self._parameters)))
        groups = [
            {**options, "params": [next(indices) for _ in options["params"]]}
            for options in self.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def _update_slices(self) -> None:
        """Update this rank's slices with the present options of the groups."""
        for local, options in zip(self._local.param_groups, self.param_groups, strict=True):
            local |= {key: value for key, value in options.items() if key != "params"}
        for index, start, stop, values in self._slices:
            p = self._parameters[index]
            values.copy_(p.reshape(-1)[start:stop])
            values.grad = None if p.grad is None else p.grad.reshape(-1)[start:stop]
        self._local.step()

    def _take_slices(self, whole: Mapping[Tensor, State]) -> None:
        """Copy this rank's slices of the parameters and of their state."""
        bounds, indices = dict(self._find_bounds()), iter(range(len(self._parameters)))
        self._local.param_groups = []
        for options in self.param_groups:
            slices = []
            for p in options["params"]:
                index = next(indices)
                start, stop = bounds[index]
                if start < stop:
                    values = nn.Parameter(p.detach().reshape(-1)[start:stop].clone())
                    slices.append(_Slice(index, start, stop, values))
                    state = whole.get(p, {}).items()
                    self._local.state[values] = {
                        k: _cut_value(k, v, p, start, stop) for k, v in state
                    }
            self._local.param_groups.append({**options, "params": [s.values for s in slices]})
            self._slices += slices

    def _find_bounds(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield index and bounds of this rank's slice of each parameter."""
        rank = distributed.get_rank(self._group)
        for dtype in {p.dtype for p in self._parameters}:
            sizes = [(i, p.numel()) for i, p in enumerate(self._parameters) if p.dtype == dtype]
            counts = _count_elements(sum(size for _, size in sizes), self._group)
            first, last = sum(counts[:rank]), sum(counts[: rank + 1])
            offset = 0
            for index, size in sizes:
                low, high = (min(max(cut - offset, 0), size) for cut in (first, last))
                yield index, (low, high)
                offset += size

    def _join_slices(self) -> Iterator[tuple[torch.dtype, Tensor]]:
        """Yield this rank's weights of each dtype in a row."""
        for dtype in sorted({p.dtype for p in self._parameters}, key=str):
            first = next(p for p in self._parameters if p.dtype == dtype)
            slices = [s for s in self._slices if s.values.dtype == dtype]
            row = [s.values.detach() for s in sorted(slices)]
            yield dtype, torch.cat(row) if row else first.new_empty(0)

    def _copy_state(self) -> dict[int, State]:
        """Copy the state of this rank's slices to the CPU, by index of the parameter."""
        state = {}
        for s in self._slices:
            items = self._local.state.get(s.values, {}).items()
            state[s.place] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in items}
        return state


def check_elementwise(optimizer: Optimizer) -> None:
    """Check that an optimiser updates a slice of a parameter as it updates the whole.

    It is tried out: a matrix, and the same matrix in two slices, get three updates.
    """
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(8, 13, generator=generator))
    slices = [nn.Parameter(s.clone()) for s in torch.split(whole.detach().view(-1), [37, 67])]
    copies = [_copy_empty(optimizer, parameters) for parameters in ([whole], slices)]
    for _ in range(3):
        gradient = torch.randn(8, 13, generator=generator)
        whole.grad = gradient
        for values, part in zip(slices, torch.split(gradient.view(-1), [37, 67]), strict=True):
            values.grad = part.clone()
        for twin in copies:
            twin.step()
    if not torch.equal(whole.detach().view(-1), torch.cat([s.detach() for s in slices])):
        raise ModelError(
            f"{type(optimizer).__name__} updates a slice of a parameter in another way than the "
            f"whole. Only an element-wise optimiser without fused=True, such as SGD or AdamW, can "
            f"be sharded. Leave shard out."
        )


def _copy_empty(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """Copy an optimiser with other parameters and without state."""
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": parameters}]
    return twin


def _count_elements(total: int, group: ProcessGroup) -> list[int]:
    """Count the elements that each rank owns."""
    ranks = distributed.get_num_ranks(group)
    return [total * (rank + 1) // ranks - total * rank // ranks for rank in range(ranks)]


def _cut_value(key: str, value: Any, p: Tensor, start: int, stop: int) -> Any:
    """Cut a value of the state if it has one element per weight, otherwise copy it."""
    if key != "step" and isinstance(value, Tensor) and value.shape == p.shape:
        return value.reshape(-1)[start:stop].clone()
    return copy.deepcopy(value)


def _join_values(key: str, slices: list[State], p: Tensor) -> Any:
    values = [state[key] for state in slices]
    if key != "step" and isinstance(values[0], Tensor) and values[0].ndim == 1:
        return torch.cat(values).view(p.shape)
    return values[0]
