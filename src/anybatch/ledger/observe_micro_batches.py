"""Micro-batches in a loop of one's own, told apart by the way tensors take from call to call.

    model(x_1), model(x_2)              two micro-batches: the same module, with other inputs
    model.head(model.body(x))           one: the second call takes in what the first has made
    model.head(stack([h_1, .., h_7]))   that of all seven, one behind the other

`find_sources` follows the graph of autograd back from the inputs of a call to the nearest outputs
that are marked.

What a refusal in a loop of one's own says beyond its cause: how to name the examples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from anybatch.compiled import unwrap
from anybatch.errors import LedgerError
from anybatch.ledger.collect import Collector
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.placement import Meeting, Placement

__all__ = [
    "MicroBatch",
    "Output",
    "Trail",
    "find_sources",
    "hinted",
    "join",
    "mark",
    "marked_micro_batch",
    "own_rows",
    "refuse_unknown",
]

Trail = frozenset[str]
"""Kinds of operations through which tensors were made."""


class Output(NamedTuple):
    """An output of a call, from which a pass can go back."""

    target: "tuple[MicroBatch, ...]"
    is_outside: bool  # of an operation outside of any module
    edge: GradientEdge
    shape: torch.Size
    like: Tensor  # an empty tensor of the same type, on the same device

    @classmethod
    def of(cls, tensor: Tensor, target: "tuple[MicroBatch, ...]", is_outside: bool) -> Self:
        """The output that a tensor with a graph is."""
        like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return cls(target, is_outside, get_gradient_edge(tensor), tensor.shape, like)


class MicroBatch:
    """Examples that pass through the model together, and what backward passes show of them."""

    def __init__(self, number: int, size: int, inputs: list[torch.Size]) -> None:
        self.number = number
        """In the order of forward passes."""
        self.size = size
        self.inputs = inputs
        """Shapes of the tensors that the first call was given."""
        self.modules: set[nn.Module] = set()
        """Those that were called with it."""
        self.calls: list[str] = []
        """Names of the calls."""
        self.way: frozenset[tuple[str, Trail]] = frozenset()
        """The calls that it has gone through, and what was between them."""
        self.checks: dict[frozenset[tuple[str, Trail]], bool] = {}
        """Whether placements are confirmed once it has gone so far."""
        self.uses: dict[str, int] = {}
        """How often each parameter was used."""
        self.is_counted = True
        """Whether `uses` holds all; not so where a call takes in several micro-batches."""
        self.outputs: list[Output] = []
        """Where a pass that confirms placements begins."""
        self.squares: dict[str, Tensor] = {}
        """|g_i|^2 [B], by parameter."""
        self.kept: dict[str, list[Contraction]] = {}
        """Uses that a further backward pass may add to."""
        self.collector: Collector | None = None
        """While a backward pass runs."""
        self._joined: MicroBatch | None = None

    @property
    def input_shape(self) -> torch.Size:
        """The shape of the first tensor that the first call was given; () if there was none."""
        return self.inputs[0] if self.inputs else torch.Size()

    @property
    def root(self) -> "MicroBatch":
        """The micro-batch that this one has turned out to be."""
        return self if self._joined is None else self._joined.root

    def forget(self) -> None:
        """Drop all figures: the gradients that they belong to are gone."""
        self.squares.clear()
        self.kept.clear()

    def join(self, other: "MicroBatch") -> None:
        """Take another one for the same examples."""
        if self.squares or other.squares or not (self.is_counted and other.is_counted):
            raise LedgerError(
                "a module takes in two outputs for the same examples, after one of them has gone "
                "backward or has been stacked with others. The ledger cannot tell which examples "
                "they belong to. Call the model as a whole, as one nn.Module."
            )
        other._joined = self
        for name, count in other.uses.items():
            self.uses[name] = self.uses.get(name, 0) + count
        self.modules |= other.modules
        self.calls += other.calls
        self.way |= other.way
        self.outputs += other.outputs


def mark(tensor: Tensor, target: tuple[MicroBatch, ...], key: object) -> None:
    """Note on the graph of an output to which micro-batches it belongs, under a loop's key."""
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata[key] = target


def marked_micro_batch(node: Any, key: object) -> MicroBatch | None:
    """The micro-batch of a node of the graph that is marked with a single one."""
    target = node.metadata.get(key)
    return target[0].root if target is not None and len(target) == 1 else None


def find_sources(tensors: Iterable[Tensor], key: object) -> tuple[list[MicroBatch], Trail]:
    """The micro-batches of a loop that tensors were made from, in the order of forward passes.

    Returns:
        Them, and the kinds of operations in between.
    """
    found: set[MicroBatch] = set()
    trail: set[str] = set()
    todo: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        target = node.metadata.get(key)
        if target is None:
            trail.add(node.name())
            todo += [parent for parent, _ in node.next_functions]
        else:
            found |= {micro_batch.root for micro_batch in target}
    return sorted(found, key=lambda micro_batch: micro_batch.number), frozenset(trail)


def join(sources: Sequence[MicroBatch], rows: int | None) -> tuple[MicroBatch, ...]:
    """The target of a call that takes in several micro-batches, as so many rows.

    Raises:
        LedgerError: neither one behind the other, nor the same examples.
    """
    sizes = [source.size for source in sources]
    if rows == sum(sizes):
        for source in sources:
            source.is_counted = False
        return tuple(sources)
    first, *others = sources
    if {first.size} != {*sizes, rows}:
        raise LedgerError(
            f"the outputs of {len(sizes)} calls, with {', '.join(map(str, sizes))} examples, meet "
            f"a parameter together, as {rows or 'no'} rows. The ledger cannot tell which row "
            f"belongs to which example. Call the model as a whole, as one nn.Module, or "
            f"concatenate the outputs along their first dimension."
        )
    for other in others:
        first.join(other)
    return (first,)


def own_rows(meeting: Meeting, placement: Placement, size: int, d: Tensor) -> Placement:
    """Name the owner of rows that belong to one example; refuse those of several.

    Raises:
        LedgerError: rows that were moved: a loss of each example would be needed to follow them.
    """
    if placement.kind != "rows":
        return placement
    if size > 1:
        raise LedgerError(
            f"the rows of the {meeting} are moved by what they hold (packed, routed, sorted), and "
            f"nothing tells which example each belongs to. Use ab.batch_gradient with "
            f"observe=..., which knows the loss of each example, or leave the model unobserved."
        )
    return placement.owned(torch.zeros(len(placement.rows(d)), dtype=torch.long, device=d.device))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def refuse_unknown(meeting: Meeting, *_: Any) -> NoReturn:
    raise LedgerError(
        f"the {meeting} was run again in the backward pass, and the ledger cannot tell for which "
        f"of the forward passes. Use checkpointing with use_reentrant=False, or go backward after "
        f"each call of the model."
    )


@contextmanager
def hinted(size: int, is_dim_given: bool, without_examples: Mapping[str, str]) -> Iterator[None]:
    """Add hints to a refusal, once.

    Args:
        size: how many examples the ledger takes there to be.
        is_dim_given: whether the user has said along which dimension they lie.
        without_examples: names of modules that were called without any, and shapes of their inputs.
    """
    try:
        yield
    except LedgerError as error:
        text = str(error)
        if without_examples:
            calls = "; ".join(f"{n or 'the model'} ({s})" for n, s in without_examples.items())
            hint = (
                f"Tensors with as many rows as there are examples are expected, but these modules "
                f"were called without any: {calls}. Call the model as a whole, as one nn.Module, "
                f"or say how many examples there are: ab.observe(model, examples=B)."
            )
        elif not is_dim_given:
            hint = (
                f"The ledger takes the {size} rows along dimension 0 of the first tensor for "
                f"examples. If they are something else, say so: ab.observe(model, dim=1), or "
                f"examples=B."
            )
        else:
            raise
        if hint not in text:
            error.args = (f"{text} {hint}",)
        raise
