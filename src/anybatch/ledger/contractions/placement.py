"""Placement: where the examples of a batch lie in a tensor.

    dim k      t[.., i, ..], index i of dimension k, belongs to example i
    outer k    indices i T .. (i + 1) T - 1 belong to example i: a view of [.., B, T, ..]
    inner k    indices i, i + B, i + 2 B, ... belong to example i: a view of [.., T, B, ..]
    rows k     the first k dimensions are rows; gradients show who owns each row (`row_owners`)

B is the number of examples. A shape can allow several placements, for instance when a sequence is
as long as the batch. The backward pass of a single example decides between them: the gradients of
all other examples must be 0. The plan stores the decision, so that later batches of other shapes
use the same placement.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from anybatch.ledger.graph_form import GraphForm
from anybatch.ledger.row_moves import RowMoves
from anybatch.ledger.unplaced import UnplacedError

__all__ = [
    "Placement",
    "Plan",
    "Site",
    "group_rows",
    "is_consistent",
    "list_placements",
    "make_moved_error",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """One way for examples to lie in a tensor."""

    kind: Literal["dim", "outer", "inner", "rows"]
    dim: int = 0
    owners: Tensor | None = field(default=None, compare=False)  # [N], example of each row, or -1
    layout: "Placement | None" = field(default=None, compare=False)  # where copies were laid out

    def move_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return a view [B, ...] with the examples first and the other dimensions unchanged."""
        k = self.dim
        if self.kind == "dim":
            return tensor.movedim(k, 0) if k else tensor
        if self.kind == "rows":
            assert self.owners is not None
            return group_rows(self.flatten_rows(tensor), self.owners, num_examples)
        is_outer = self.kind == "outer"
        sizes = (num_examples, -1) if is_outer else (-1, num_examples)
        split: Tensor = tensor.unflatten(k, sizes)  # type: ignore[no-untyped-call]
        return split.movedim(k if is_outer else k + 1, 0)

    def move_back(self, tensor: Tensor) -> Tensor:
        """Undo `move_first`: return the tensor of which it would make this [B, ...]."""
        k = self.dim
        if self.kind == "dim":
            return tensor.movedim(0, k) if k else tensor
        return tensor.movedim(0, k if self.kind == "outer" else k + 1).flatten(k, k + 1)

    def flatten_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor as [N, ...]."""
        return tensor.flatten(0, self.dim - 1)

    def with_owners(self, owners: Tensor) -> Self:
        """Return this placement with the example of each row, [N]."""
        return replace(self, owners=owners)

    def with_one_owner(self, tensor: Tensor) -> Self:
        """Return this placement with all rows of a tensor owned by the only example."""
        num_rows = len(self.flatten_rows(tensor))
        return self.with_owners(torch.zeros(num_rows, dtype=torch.long, device=tensor.device))


def list_placements(
    shape: tuple[int, ...], num_examples: int, leading: int, *, by_rows: bool = False
) -> list[Placement]:
    """List the placements that a shape allows, the likeliest first.

    Args:
        num_examples: B.
        leading: number of leading dimensions that can hold the examples.
        by_rows: whether these dimensions can also be rows whose owners are unknown.
    """
    possible = [Placement("dim", k) for k in range(leading) if shape[k] == num_examples]
    for k in range(leading):
        if shape[k] and shape[k] % num_examples == 0:
            possible += [Placement("outer", k), Placement("inner", k)]
    if by_rows and leading:
        possible.append(Placement("rows", leading))
    return possible


def is_consistent(placement: Placement, gradient: Tensor, mask: Tensor) -> bool:
    """Return whether a gradient is 0 for all examples but those of a mask [B]."""
    rows = placement.move_first(gradient, len(mask)).reshape(len(mask), -1)
    return not bool((rows.any(1) & ~mask).any())


def group_rows(rows: Tensor, owners: Tensor, num_examples: int) -> Tensor:
    """Group rows [N, ...] by example into [B, T, ...], padded with zeros.

    Args:
        rows: of all examples, in any order; the rows of one example stay in their order.
        owners: [N], the example of each row; -1 leaves a row out.
        num_examples: B.
    """
    indices = torch.argsort(owners, stable=True)
    indices = indices[owners[indices] >= 0]
    examples = owners[indices]
    counts = torch.bincount(examples, minlength=num_examples)
    places = torch.arange(len(indices), device=rows.device) - (counts.cumsum(0) - counts)[examples]
    groups = rows.new_zeros(num_examples, max(1, int(counts.max())), *rows.shape[1:])
    groups[examples, places] = rows[indices]
    return groups


@dataclass(frozen=True, slots=True)
class Site:
    """An operation of the model that uses a parameter. Each site has one placement."""

    parameter: str = field(compare=False)  # or the name of a tensor computed from parameters
    label: str  # of the operation's first parameter, the same in every pass
    operation: str
    ndim: int  # of the operand that holds the examples

    def __str__(self) -> str:
        return f"{self.operation} of {self.label}"


def make_moved_error(site: Site) -> UnplacedError:
    """Make the error for rows of a site whose owners are unknown."""
    return UnplacedError(
        f"The model moves the rows of the {site} by their content (packed, routed, sorted), and "
        f"the ledger cannot tell which example each belongs to. Use ab.batch_gradient with "
        f"observe=..., which has the loss of each example, or leave the model unobserved."
    )


@dataclass(slots=True)
class Plan:
    """Placements of all sites of a model in one mode."""

    placements: dict[Site, Placement | None] = field(default_factory=dict)
    """None: this operation does not contain the examples."""
    rejections: dict[Site, list[Placement | None]] = field(default_factory=dict)
    operand_flags: dict[Site, tuple[bool, ...]] = field(default_factory=dict)
    """Which operands of an operation contain examples."""
    unconfirmed: set[Site] = field(default_factory=set)
    """Sites whose placement follows from the shape alone; no gradient has confirmed it yet."""
    num_steps: int = 0
    """Number of steps that have asked for the plan."""
    row_moves: RowMoves = field(default_factory=RowMoves)
    needs_copies: bool = False
    """True if each example needs its own copy of the parameters. The loss differentiates a
    gradient, and autograd can differentiate through copies."""
    is_linear: bool = True
    """True if gradients are proportional to the weights of the examples."""
    graph: GraphForm | None = None
    """Form of autograd's graph, if it shows all uses of parameters; see `graph_pass`."""
    has_new_form: bool = False
    """True if the graph has changed its form, and no watched pass has confirmed the rows since."""
    one_by_one: str | None = None
    """Reason why examples go backward one at a time, without placements; None: they do not."""

    @property
    def has_rows(self) -> bool:
        """True if some site has rows, whose owners must be found at every step."""
        return any(p is not None and p.kind == "rows" for p in self.placements.values())

    def go_one_by_one(self, cause: str) -> None:
        """Take the examples backward one at a time from now on, and log a warning."""
        self.one_by_one = cause
        _log.warning(
            "The ledger takes examples one after the other. This needs as many backward passes as "
            "there are examples; the results are exact. Cause: %s",
            cause,
        )

    def choose_placement(
        self, site: Site, possible: list[Placement], num_examples: int
    ) -> Placement | None:
        """Return the stored placement of a site, or choose the likeliest and store it.

        Raises:
            UnplacedError: the shape does not allow the stored placement.
        """
        stored = self.placements.get(site)
        if site in self.placements and (stored is None or stored in possible):
            return stored
        rejections = self.rejections.get(site, [])
        choice = next((place for place in possible if place not in rejections), None)
        if num_examples == 1:  # everything belongs to the only example
            return choice
        if site in self.placements:
            self.reject(site, stored)
            choice = next((p for p in possible if p.kind == "rows" and p not in rejections), None)
            if choice is None:
                raise UnplacedError(
                    f"The {site} had its examples at {stored} so far. Its shape now allows them "
                    f"only at {possible or 'no place'}. Keep examples along one dimension, "
                    f"whatever the size of the batch."
                )
        self.placements[site] = choice
        self.unconfirmed.add(site)
        return choice

    def reject(self, site: Site, placement: Placement | None) -> None:
        """Exclude a placement; the next pass chooses another one."""
        rejections = self.rejections.setdefault(site, [])
        if placement not in rejections:
            rejections.append(placement)
        if self.placements.get(site) == placement:  # another use may have rejected it already
            self.placements.pop(site, None)
            self.operand_flags.pop(site, None)
