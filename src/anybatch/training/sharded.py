"""An optimiser whose state lies in parts on the ranks.

    rank r of W owns  floor(r n / W) .. floor((r + 1) n / W) - 1  of the n weights in a row
    G on every rank -> each updates its own by its part of the state -> all get the weights of all

An optimiser that goes element by element makes the same bits of a part as of the whole, so that a
run is the same with its state in parts or not, and checkpoints hold the whole. State, and the time
of the update, are 1/W of what they were; what travels is n more than the gradient's 2 n (W - 1)/W
by (W - 1)/W, since `.grad` stays whole for penalties, clipping and the ledger.

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


class _Piece(NamedTuple):
    """A rank's part of a parameter, which may be all of it."""

    place: int  # of the parameter, over all groups
    start: int
    stop: int  # elements of the parameter in a row
    own: nn.Parameter  # [stop - start]


class ShardedOptimizer:
    """In an optimiser's place, its state cut; what it does is collective.

    Args:
        optimizer: with the whole state so far, which is taken from it. Its groups stay what says
            rates and the like.

    Raises:
        ModelError: an optimiser that does not go element by element.
    """

    def __init__(self, optimizer: Optimizer, group: ProcessGroup) -> None:
        distributed.call_together(lambda: check_elementwise(optimizer), group)
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self._group = group
        self._held = [p for one in self.param_groups for p in one["params"]]
        self._pieces: list[_Piece] = []
        self._own = _twin(optimizer, [])
        self._cut(optimizer.state)
        optimizer.state.clear()

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters from their `.grad`."""
        distributed.call_together(self._step, self._group)
        for dtype, own in self._rows():
            parameters = [p for p in self._held if p.dtype == dtype]
            sizes = [p.numel() for p in parameters]
            row = distributed.all_gather_vectors(own, _shares(sum(sizes), self._group), self._group)
            for p, new in zip(parameters, torch.split(row, sizes), strict=True):
                p.copy_(new.view(p.shape))

    def state_dict(self) -> State:
        """Of the optimiser as if one process held all of it, on the CPU."""
        told = distributed.all_gather_object(self._own_state, self._group)
        state: dict[int, State] = {}
        for place, p in enumerate(self._held):
            parts = [part for one in told if (part := one.get(place)) is not None]
            if parts and parts[0]:
                state[place] = {key: _joined(key, parts, p) for key in parts[0]}
        places = iter(range(len(self._held)))
        groups = [
            {**one, "params": [next(places) for _ in one["params"]]} for one in self.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def _step(self) -> None:
        """Of this rank's parts, as the groups say now."""
        for own, one in zip(self._own.param_groups, self.param_groups, strict=True):
            own |= {key: value for key, value in one.items() if key != "params"}
        for piece in self._pieces:
            p = self._held[piece.place]
            piece.own.copy_(_row(p)[piece.start : piece.stop])
            piece.own.grad = None if p.grad is None else _row(p.grad)[piece.start : piece.stop]
        self._own.step()

    def _cut(self, whole: Mapping[Tensor, State]) -> None:
        """Take this rank's parts of the parameters and their state."""
        bounds, places = dict(self._owned()), iter(range(len(self._held)))
        self._own.param_groups = []
        for one in self.param_groups:
            pieces = []
            for p in one["params"]:
                place = next(places)
                start, stop = bounds[place]
                if start < stop:
                    own = nn.Parameter(_row(p.detach())[start:stop].clone())
                    pieces.append(_Piece(place, start, stop, own))
                    state = whole.get(p, {}).items()
                    self._own.state[own] = {k: _part(k, v, p, start, stop) for k, v in state}
            self._own.param_groups.append({**one, "params": [piece.own for piece in pieces]})
            self._pieces += pieces

    def _owned(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """The elements of each parameter that are this rank's."""
        rank = distributed.get_rank(self._group)
        for dtype in {p.dtype for p in self._held}:
            same = [(i, p.numel()) for i, p in enumerate(self._held) if p.dtype == dtype]
            shares = _shares(sum(size for _, size in same), self._group)
            first, last = sum(shares[:rank]), sum(shares[: rank + 1])
            begin = 0
            for index, size in same:
                low, high = (min(max(cut - begin, 0), size) for cut in (first, last))
                yield index, (low, high)
                begin += size

    def _rows(self) -> Iterator[tuple[torch.dtype, Tensor]]:
        """This rank's weights of each type in a row."""
        for dtype in sorted({p.dtype for p in self._held}, key=str):
            like = next(p for p in self._held if p.dtype == dtype)
            pieces = [piece for piece in self._pieces if piece.own.dtype == dtype]
            own = [piece.own.detach() for piece in sorted(pieces)]
            yield dtype, torch.cat(own) if own else like.new_empty(0)

    def _own_state(self) -> dict[int, State]:
        """By parameter, its parts on the CPU."""
        found = {}
        for piece in self._pieces:
            items = self._own.state.get(piece.own, {}).items()
            found[piece.place] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in items}
        return found


def check_elementwise(optimizer: Optimizer) -> None:
    """See that a part of a parameter is updated as it would be within the whole.

    Seen, not listed: a matrix, and the same in two parts, are updated three times.

    Raises:
        ModelError: an optimiser that makes other bits of the parts.
    """
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(8, 13, generator=generator))
    parts = [nn.Parameter(part.clone()) for part in torch.split(whole.detach().view(-1), [37, 67])]
    twins = [_twin(optimizer, held) for held in ([whole], parts)]
    for _ in range(3):
        gradient = torch.randn(8, 13, generator=generator)
        whole.grad = gradient
        for part, own in zip(parts, torch.split(gradient.view(-1), [37, 67]), strict=True):
            part.grad = own.clone()
        for twin in twins:
            twin.step()
    if not torch.equal(whole.detach().view(-1), torch.cat([part.detach() for part in parts])):
        raise ModelError(
            f"{type(optimizer).__name__} makes another update of a part of a parameter than of the "
            f"whole, expected one that goes element by element, without fused=True, such as SGD or "
            f"AdamW: its state cannot lie in parts on the ranks. Leave shard out."
        )


def _twin(optimizer: Optimizer, held: list[nn.Parameter]) -> Optimizer:
    """An optimiser alike that holds other parameters, with nothing done yet."""
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": held}]
    return twin


def _shares(total: int, group: ProcessGroup) -> list[int]:
    """How many of so many elements each rank owns."""
    ranks = distributed.get_num_ranks(group)
    return [total * (rank + 1) // ranks - total * rank // ranks for rank in range(ranks)]


def _row(tensor: Tensor) -> Tensor:
    """Its elements in a row, a copy where they are not in memory."""
    return tensor.reshape(-1)


def _part(key: str, value: Any, p: Tensor, start: int, stop: int) -> Any:
    """Of a value of the state: what has an element for each of the parameter's is cut."""
    if key != "step" and isinstance(value, Tensor) and value.shape == p.shape:
        return _row(value)[start:stop].clone()
    return copy.deepcopy(value)


def _joined(key: str, parts: list[State], p: Tensor) -> Any:
    values = [part[key] for part in parts]
    if key != "step" and isinstance(values[0], Tensor) and values[0].ndim == 1:
        return torch.cat(values).view(p.shape)
    return values[0]
