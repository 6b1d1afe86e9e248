"""A call of torch that takes parameters, or what was made of parameters alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from anybatch.ledger.placement import Meeting
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["Call", "broadcast_size", "num_repeated", "refuse_parameter_gradient"]


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
