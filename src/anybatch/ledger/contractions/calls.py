"""A call of torch that takes parameters, or what was made of parameters alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.einsum import Summed
from anybatch.ledger.contractions.placement import Meeting, Placement, placements
from anybatch.ledger.unplaced import UnplacedError

__all__ = [
    "Call",
    "as_factor",
    "broadcast_size",
    "make_summed",
    "num_repeated",
    "refuse_parameter_gradient",
]


class Call(NamedTuple):
    """A call that meets parameters."""

    func: Any
    args: Any
    kwargs: Any
    data: list[Tensor]  # operands that are none
    met: list[Tensor]  # parameters, and what was made of them
    meetings: dict[int, Meeting]  # by their id

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    @property
    def first(self) -> Meeting:
        return next(iter(self.meetings.values()))

    def free_places(
        self, shape: tuple[int, ...], num_examples: int, *, by_rows: bool
    ) -> list[Placement]:
        """List the places along which all parameters are repeated when they are broadcast."""
        ndim = len(shape)
        possible = [
            place
            for place in placements(shape, num_examples, ndim)
            if all(broadcast_size(t, place.dim, ndim) == 1 for t in self.met)
        ]
        leading = min(num_repeated(t, ndim) for t in self.met)
        return [*possible, Placement("rows", leading)] if by_rows and leading else possible

    def refuse_shared(self, num_examples: int) -> NoReturn:
        """Refuse a call in which parameters meet rows that belong to nobody."""
        shapes = ", ".join(str(tuple(t.shape)) for t in self.data)
        raise UnplacedError(
            f"the {self.first} meets a tensor of shape {shapes} in a batch of "
            f"{num_examples} examples, and no part of it belongs to one of them alone. "
            f"Are rows of different examples mixed there (packed, routed, sorted), or does the "
            f"model couple examples? Keep examples along a dimension of their own, freeze the "
            f"parameter, or leave the model unobserved."
        )

    @property
    def is_in_place(self) -> bool:
        """Whether it writes into what was made of parameters, which stays what it is."""
        name = self.func.__name__
        is_write = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        return is_write and id(self.args[0]) in self.meetings


def broadcast_size(p: Tensor, dim: int, ndim: int) -> int:
    """The size of a dimension of a tensor that is broadcast to so many, 1 where it is repeated."""
    own = dim - (ndim - p.ndim)
    return p.shape[own] if own >= 0 else 1


def num_repeated(p: Tensor, ndim: int) -> int:
    """The number of leading dimensions along which a tensor is repeated once it is broadcast."""
    return next((k for k in range(ndim) if broadcast_size(p, k, ndim) != 1), ndim)


def refuse_parameter_gradient(names: Mapping[int, str], leaves: list[Any]) -> NoReturn:
    """Refuse a gradient with respect to a parameter inside of the loss."""
    name = next(names[id(leaf)] for leaf in leaves if id(leaf) in names)
    raise UnplacedError(
        f"The loss differentiates with respect to the parameter {name}. That gradient mixes "
        f"examples, or is not in the graph that the ledger watches. Leave the model unobserved."
    )


def as_factor(saved: Tensor, d: Tensor) -> Tensor:
    """What d is multiplied by in the gradient: the conjugate, where it is complex, in the type of
    d, which under autocast is another than that of the input."""
    is_number = saved.is_floating_point() or saved.is_complex()
    return saved.to(d.dtype).conj().resolve_conj() if is_number else saved


def make_summed(
    shape: torch.Size, letters: str, example: str, parts: Sequence[tuple[Tensor, str]], _: Placement
) -> Contraction:
    return Summed.of(shape, letters, example, parts)
