"""Where the examples of a batch lie in a tensor.

    dim k      t[.., i, ..], i at place k, belongs to example i
    outer k    those at i T .. (i + 1) T - 1 do: a view of [.., B, T, ..]
    inner k    those at i, i + B, i + 2 B, ... do: a view of [.., T, B, ..]
    rows k     the first k dimensions are those of rows, whose owners gradients tell (`rows`)

B examples. Shapes leave several possible, a sequence as long as the batch for instance; which one
it is shows when the loss of one example alone goes back: gradients of the others are then 0. It is
noted in a plan, since no later batch, with shapes of its own, may be taken for something else.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from anybatch.ledger.row_moves import Moves
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["Meeting", "Placement", "Plan", "agrees", "placements"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """One way for examples to lie in a tensor."""

    kind: Literal["dim", "outer", "inner", "rows"]
    dim: int = 0
    owners: Tensor | None = field(default=None, compare=False)  # of rows, once they are known
    layout: "Placement | None" = field(default=None, compare=False)  # of copies that lie so

    def first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """A view [B, ...] with the examples first, all other dimensions in their order."""
        k = self.dim
        if self.kind == "dim":
            return tensor.movedim(k, 0) if k else tensor
        if self.kind == "rows":
            assert self.owners is not None
            return by_example(self.rows(tensor), self.owners, num_examples)
        is_outer = self.kind == "outer"
        sizes = (num_examples, -1) if is_outer else (-1, num_examples)
        laid: Tensor = tensor.unflatten(k, sizes)  # type: ignore[no-untyped-call]
        return laid.movedim(k if is_outer else k + 1, 0)

    def rows(self, tensor: Tensor) -> Tensor:
        """[N, ...], the rows of a tensor one after the other."""
        return tensor.flatten(0, self.dim - 1)

    def owned(self, owners: Tensor) -> Self:
        """The same once it is known whose the rows are: [N]."""
        return replace(self, owners=owners)

    def back(self, tensor: Tensor) -> Tensor:
        """What `first` would make [B, ...] of."""
        k = self.dim
        if self.kind == "dim":
            return tensor.movedim(0, k) if k else tensor
        return tensor.movedim(0, k if self.kind == "outer" else k + 1).flatten(k, k + 1)


def placements(shape: tuple[int, ...], num_examples: int, leading: int) -> list[Placement]:
    """The possible ones for a tensor, the likeliest first.

    Args:
        shape: of the tensor.
        num_examples: B.
        leading: how many of its dimensions may be those of examples.
    """
    found = [Placement("dim", k) for k in range(leading) if shape[k] == num_examples]
    for k in range(leading):
        if shape[k] and shape[k] % num_examples == 0:
            found += [Placement("outer", k), Placement("inner", k)]
    return found


def agrees(placement: Placement, gradient: Tensor, chosen: Tensor) -> bool:
    """Whether the gradient of chosen examples' losses, [B], is 0 at the places of all others."""
    rows = placement.first(gradient, len(chosen)).reshape(len(chosen), -1)
    return not bool((rows.any(1) & ~chosen).any())


@dataclass(frozen=True, slots=True)
class Meeting:
    """Which operation meets which parameter: what a placement belongs to."""

    parameter: str = field(compare=False)  # or what was made of parameters
    label: str  # of the first parameter of the operation, the same in every pass
    operation: str
    ndim: int  # of what it is met by

    def __str__(self) -> str:
        return f"{self.operation} of {self.label}"


@dataclass(slots=True)
class Plan:
    """Which of the possible placements each meeting has; None: the examples are nowhere in it."""

    chosen: dict[Meeting, Placement | None] = field(default_factory=dict)
    rejected: dict[Meeting, list[Placement | None]] = field(default_factory=dict)
    carriers: dict[Meeting, tuple[bool, ...]] = field(default_factory=dict)
    """Which operands have examples."""
    unsure: set[Meeting] = field(default_factory=set)
    """Chosen by their shape alone, and not confirmed by a gradient yet."""
    num_steps: int = 0
    """How often it was asked for."""
    moves: Moves = field(default_factory=Moves)
    """Which calls may put rows elsewhere."""
    by_copies: bool = False
    """Whether each example meets copies of the parameters, which autograd can differentiate twice:
    the loss differentiates a gradient."""
    is_linear: bool = True
    """Whether gradients are in proportion to the weights that examples go back with."""
    one_by_one: str | None = None
    """Why examples go back one after the other, without a plan; None: they do not."""

    @property
    def has_rows(self) -> bool:
        """Whether owners of rows are to be found, anew at each step."""
        return any(place is not None and place.kind == "rows" for place in self.chosen.values())

    def go_one_by_one(self, cause: str) -> None:
        """Let examples go back one after the other from now on, and say so."""
        self.one_by_one = cause
        _log.warning(
            "The ledger takes examples one after the other: as many backward passes as there are "
            "examples, where one would do. Its figures are exact. Cause: %s",
            cause,
        )

    def placement(
        self, meeting: Meeting, possible: list[Placement], num_examples: int
    ) -> Placement | None:
        """That of a meeting: the one noted, or the likeliest, which is then noted.

        Raises:
            UnplacedError: the one noted is not possible.
        """
        noted = self.chosen.get(meeting)
        if meeting in self.chosen and (noted is None or noted in possible):
            return noted
        refused = self.rejected.get(meeting, [])
        found = next((place for place in possible if place not in refused), None)
        if num_examples == 1:  # whatever there is belongs to that example
            return found
        if meeting in self.chosen:
            self.reject(meeting, noted)
            found = next((p for p in possible if p.kind == "rows" and p not in refused), None)
            if found is None:
                raise UnplacedError(
                    f"the {meeting} has had its examples at {noted} so far, but its shape leaves "
                    f"them only at {possible or 'no place'} now. Keep examples along one "
                    f"dimension, whatever the size of the batch."
                )
        self.chosen[meeting] = found
        self.unsure.add(meeting)
        return found

    def reject(self, meeting: Meeting, placement: Placement | None) -> None:
        """Take the next possible placement from now on."""
        refused = self.rejected.setdefault(meeting, [])
        if placement not in refused:
            refused.append(placement)
        if self.chosen.get(meeting) == placement:  # another use may have moved on already
            self.chosen.pop(meeting, None)
            self.carriers.pop(meeting, None)


def by_example(rows: Tensor, owners: Tensor, num_examples: int) -> Tensor:
    """Rows [N, ...] sorted by example [B, T, ...], in their order, zeros behind the last of each.

    Args:
        rows: in any order.
        owners: [N], -1 for rows that are to be left out.
        num_examples: B.
    """
    order = torch.argsort(owners, stable=True)
    order = order[owners[order] >= 0]
    examples = owners[order]
    counts = torch.bincount(examples, minlength=num_examples)
    places = torch.arange(len(order), device=rows.device) - (counts.cumsum(0) - counts)[examples]
    found = rows.new_zeros(num_examples, max(1, int(counts.max())), *rows.shape[1:])
    found[examples, places] = rows[order]
    return found
