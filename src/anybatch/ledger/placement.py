"""Where the examples of a batch lie in a tensor.

    dim k      t[.., i, ..], i at place k, belongs to example i
    outer k    those at i T .. (i + 1) T - 1 do: a view of [.., B, T, ..]
    inner k    those at i, i + B, i + 2 B, ... do: a view of [.., T, B, ..]

B examples. Shapes leave several possible, a sequence as long as the batch for instance; which one
it is shows when the loss of one example alone goes back: gradients of the others are then 0. It is
noted in a plan, since no later batch, with shapes of its own, may be taken for something else.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from anybatch.errors import LedgerError
from anybatch.ledger.moves import Moves

__all__ = ["Meeting", "Placement", "Plan", "agrees", "placements"]


@dataclass(frozen=True, slots=True)
class Placement:
    """One way for examples to lie in a tensor."""

    kind: Literal["dim", "outer", "inner"]
    dim: int = 0

    def first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """A view [B, ...] with the examples first, all other dimensions in their order."""
        k = self.dim
        if self.kind == "dim":
            return tensor.movedim(k, 0) if k else tensor
        is_outer = self.kind == "outer"
        sizes = (num_examples, -1) if is_outer else (-1, num_examples)
        laid: Tensor = tensor.unflatten(k, sizes)  # type: ignore[no-untyped-call]
        return laid.movedim(k if is_outer else k + 1, 0)

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

    def placement(
        self, meeting: Meeting, possible: list[Placement], num_examples: int
    ) -> Placement | None:
        """That of a meeting: the one noted, or the likeliest, which is then noted.

        Raises:
            LedgerError: the one noted is not possible.
        """
        noted = self.chosen.get(meeting)
        if meeting in self.chosen and (noted is None or noted in possible):
            return noted
        refused = self.rejected.get(meeting, [])
        found = next((place for place in possible if place not in refused), None)
        if num_examples == 1:  # whatever there is belongs to that example
            return found
        if meeting in self.chosen:
            raise LedgerError(
                f"the {meeting} has had its examples at {noted} so far, expected them there again, "
                f"but its shape leaves them only at {possible or 'no place'}. Keep examples along "
                f"one dimension, whatever the size of the batch."
            )
        self.chosen[meeting] = found
        self.unsure.add(meeting)
        return found

    def reject(self, meeting: Meeting) -> None:
        """Not there: take the next one from now on."""
        self.rejected.setdefault(meeting, []).append(self.chosen.pop(meeting))
        self.carriers.pop(meeting, None)
