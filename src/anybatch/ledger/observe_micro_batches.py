"""Micro-batches in the user's own loop, found by following tensors from call to call.

    model(x_1), model(x_2)              two micro-batches: one module, with other inputs
    model.head(model.body(x))           one: the second call takes the output of the first
    model.head(stack([h_1, .., h_7]))   all seven, one after the other

`find_sources` follows autograd's graph from the inputs of a call back to the nearest outputs that
are marked.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from anybatch.compiled import unwrap
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.placement import Placement, Site, make_moved_error
from anybatch.ledger.trial_run import iterate_nodes

__all__ = [
    "MicroBatch",
    "MicroBatchTracker",
    "Output",
    "Path",
    "Target",
    "Trail",
    "add_hints",
    "assign_rows",
    "count_rows",
    "find_sources",
    "format_shapes",
    "get_single_mark",
    "mark_output",
    "refuse_unknown",
    "trainable",
]

Trail = frozenset[str]
"""Kinds of operations between a call and those before it."""
Path = frozenset[tuple[str, Trail]]
"""Calls that a micro-batch has passed through, with the operations between them."""
Target = tuple["MicroBatch", ...]
"""Micro-batches whose examples a call processes, one after the other."""


class Output(NamedTuple):
    """An output of a call, from which a backward pass can begin."""

    target: Target
    is_outside: bool  # of an operation outside of any module
    edge: GradientEdge
    shape: torch.Size
    like: Tensor  # an empty tensor of the same type, on the same device

    @classmethod
    def from_tensor(cls, tensor: Tensor, target: Target, is_outside: bool) -> Self:
        """Make the output of a tensor with a graph."""
        like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return cls(target, is_outside, get_gradient_edge(tensor), tensor.shape, like)


class MicroBatch:
    """Examples that pass through the model together, and results of their backward passes.

    Args:
        number: position in the order of forward passes.
        size: number of examples.
        inputs: shapes of the tensors that the first call takes.
    """

    def __init__(self, number: int, size: int, inputs: list[torch.Size]) -> None:
        self.number, self.size, self.inputs = number, size, inputs
        self.modules: set[nn.Module] = set()
        """Modules that were called with it."""
        self.calls: list[str] = []
        """Names of these calls."""
        self.path: Path = frozenset()
        self.checks: dict[Path, bool] = {}
        """True to confirm placements at the end of a path."""
        self.uses: dict[str, int] = {}
        """Number of uses of each parameter."""
        self.has_all_uses = True
        """False if a call took several micro-batches, whose uses are not counted."""
        self.outputs: list[Output] = []
        """Outputs from which placements are confirmed."""
        self.squares: dict[str, Tensor] = {}
        """|g_i|^2 [B], by parameter."""
        self.earlier: dict[str, list[Contraction]] = {}
        """Uses of earlier backward passes, which the next one can add to."""
        self._merged_into: MicroBatch | None = None

    @property
    def input_shape(self) -> torch.Size:
        """Shape of the first tensor that the first call takes, or ()."""
        return self.inputs[0] if self.inputs else torch.Size()

    @property
    def root(self) -> "MicroBatch":
        """Micro-batch that this one was merged into, or itself."""
        return self if self._merged_into is None else self._merged_into.root

    def clear_results(self) -> None:
        """Forget the results, whose gradients are no longer in `.grad`."""
        self.squares.clear()
        self.earlier.clear()

    def merge(self, other: "MicroBatch") -> None:
        """Merge another micro-batch, which has the same examples, into this one."""
        is_done = self.squares or other.squares
        if is_done or not (self.has_all_uses and other.has_all_uses):
            raise LedgerError(
                "A module takes two outputs for the same examples, after one of them has gone "
                "backward or has been stacked with others. The ledger cannot tell which examples "
                "they belong to. Call the model as a whole, as one nn.Module."
            )
        other._merged_into = self
        for name, count in other.uses.items():
            self.uses[name] = self.uses.get(name, 0) + count
        self.modules |= other.modules
        self.calls += other.calls
        self.path |= other.path
        self.outputs += other.outputs


class MicroBatchTracker:
    """Finds the micro-batches of each call.

    Args:
        examples: B of each forward pass; None: the size of its first tensor.
        dim: the dimension of inputs along which examples lie; None: the first.
    """

    def __init__(self, examples: int | None, dim: int | None) -> None:
        self.open: list[MicroBatch] = []
        """Micro-batches that can go backward again."""
        self.key = object()
        """Key of the marks on the graph."""
        self.dim, self.has_dim = dim or 0, dim is not None
        self._examples = examples
        self._num_begun = 0

    def find_target(self, module: nn.Module | None, inputs: list[Tensor]) -> tuple[Target, Trail]:
        """Find the micro-batches of a call, and the operations between them and its inputs.

        Args:
            module: that is called; None: an operation outside of modules.
            inputs: tensors that the call takes.

        Returns:
            The target, () if the inputs hold no examples, and the kinds of operations.
        """
        sizes = [count_rows(t, self.dim) for t in inputs]
        num_rows = next((size for size in sizes if size is not None), None)
        sources, trail = find_sources(inputs, self.key) if self.open else ([], frozenset())
        if len(sources) > 1:
            return _combine_sources(sources, num_rows), trail
        if sources:
            self._check_dimension(sources[0].size, inputs)
            return tuple(sources), trail
        return self._begin_or_continue(module, inputs, sizes, num_rows), trail

    def check_rows(self, target: Target, outputs: list[Tensor]) -> None:
        """Check that the examples are not the rows of another input than the first."""
        micro_batch = target[0] if len(target) == 1 else None
        if micro_batch is None or self.has_dim or self._examples or len(micro_batch.calls) != 1:
            return
        rows = {t.shape[0] for t in outputs if t.grad_fn is not None and t.ndim}
        others = rows & {shape[0] for shape in micro_batch.inputs if shape}
        if others and micro_batch.size not in rows:
            raise LedgerError(
                f"The first tensor that a module was called with has {micro_batch.size} rows, but "
                f"its outputs have {min(others)}, as another input does. The ledger cannot tell "
                f"which of them are examples. Say so: "
                f"ab.observe(model, examples={min(others)}, dim=0)."
            )

    def close(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Close micro-batches that have gone backward for the last time."""
        closed = set(micro_batches)
        for micro_batch in closed:
            micro_batch.outputs.clear()
        self.open = [m for m in self.open if m.root not in closed]

    def close_all(self) -> None:
        """Close all open micro-batches, and free the graphs that they hold."""
        for micro_batch in self.open:
            micro_batch.outputs.clear()
        self.open.clear()

    def _begin_or_continue(
        self,
        module: nn.Module | None,
        inputs: list[Tensor],
        sizes: list[int | None],
        num_rows: int | None,
    ) -> Target:
        """Return the target of inputs that no other call computed; (): they hold no examples."""
        last = self.open[-1].root if self.open else None
        if last is not None and not last.squares and module not in last.modules:
            return (last,) if last.size in sizes else ()
        if self._examples and num_rows and all(n is None or n % self._examples for n in sizes):
            return ()
        size = self._examples or num_rows
        if size is None:
            raise LedgerError(
                f"A call was given no tensor with a dimension {self.dim}, along which the "
                f"examples are expected. Give the model its examples as tensors, or say how many "
                f"there are and along which dimension: ab.observe(model, examples=B, dim=1)."
            )
        self._num_begun += 1
        self.open.append(MicroBatch(self._num_begun, size, [t.shape for t in inputs]))
        return (self.open[-1],)

    def _check_dimension(self, size: int, inputs: list[Tensor]) -> None:
        """Check that the outputs of other calls have the examples along their first dimension."""
        lengths = [len(t) for t in inputs if t.ndim]
        if self.has_dim or self._examples or size in (1, *lengths) or not lengths:
            return
        is_elsewhere = any(size in t.shape[1:-1] for t in inputs)
        if is_elsewhere or all(length % size for length in lengths):
            raise LedgerError(
                f"A call takes the output of an earlier call with {size} rows, as tensors of "
                f"shapes {format_shapes(inputs)}. The ledger cannot tell whether those {size} "
                f"rows are the examples. Say how many examples there are: "
                f"ab.observe(model, examples=B); or along which dimension: "
                f"ab.observe(model, dim=1)."
            )


def count_rows(tensor: Tensor, dim: int) -> int | None:
    """Return the size of a tensor along a dimension; None: it does not have it."""
    return tensor.shape[dim] if -tensor.ndim <= dim < tensor.ndim else None


def format_shapes(tensors: list[Tensor]) -> str:
    """Format the shapes of tensors for a message."""
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def mark_output(tensor: Tensor, target: Target, key: object) -> None:
    """Note on the graph of an output which micro-batches it belongs to, under a loop's key."""
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata[key] = target


def get_single_mark(node: Any, key: object) -> MicroBatch | None:
    """Return the micro-batch of a node that is marked with exactly one."""
    target = node.metadata.get(key)
    return target[0].root if target is not None and len(target) == 1 else None


def find_sources(tensors: Iterable[Tensor], key: object) -> tuple[list[MicroBatch], Trail]:
    """Find the micro-batches that tensors were computed from, in the order of forward passes.

    Returns:
        The micro-batches, and the kinds of operations in between.
    """
    sources: set[MicroBatch] = set()
    trail: set[str] = set()
    nodes: Iterable[Any] = [t.grad_fn for t in tensors]
    for node in iterate_nodes(nodes, is_end=lambda node: key in node.metadata):
        target = node.metadata.get(key)
        if target is None:
            trail.add(node.name())
        else:
            sources |= {micro_batch.root for micro_batch in target}
    return sorted(sources, key=lambda micro_batch: micro_batch.number), frozenset(trail)


def _combine_sources(sources: Sequence[MicroBatch], num_rows: int | None) -> Target:
    """Return the target of a call that takes several micro-batches."""
    sizes = [source.size for source in sources]
    if num_rows == sum(sizes):
        for source in sources:
            source.has_all_uses = False
        return tuple(sources)
    first, *others = sources
    if {first.size} != {*sizes, num_rows}:
        raise LedgerError(
            f"The outputs of {len(sizes)} calls, with {', '.join(map(str, sizes))} examples, meet "
            f"a parameter together, as {num_rows or 'no'} rows. The ledger cannot tell which row "
            f"belongs to which example. Call the model as a whole, as one nn.Module, or "
            f"concatenate the outputs along their first dimension."
        )
    for other in others:
        first.merge(other)
    return (first,)


def assign_rows(site: Site, placement: Placement, size: int, d: Tensor) -> Placement:
    """Return a placement whose rows belong to the only example.

    Raises:
        LedgerError: there are several examples. Their losses would be needed to follow moved rows.
    """
    if placement.kind != "rows":
        return placement
    if size > 1:
        raise make_moved_error(site)
    return placement.with_one_owner(d)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def refuse_unknown(sites: list[Site], *_: Any) -> NoReturn:
    """Refuse an operation that checkpointing repeats for an unknown forward pass."""
    raise LedgerError(
        f"The {sites[0]} was run again in the backward pass, and the ledger cannot tell for "
        f"which of the forward passes. Use checkpointing with use_reentrant=False, or go backward "
        f"after each call of the model."
    )


@contextmanager
def add_hints(size: int, has_dim: bool, without_examples: Mapping[str, str]) -> Iterator[None]:
    """Add to an error within the context how to tell the ledger which rows are examples.

    Args:
        size: number of examples that the ledger assumes.
        has_dim: whether the user has named their dimension.
        without_examples: modules that were called without examples, with the shapes of their
            inputs.
    """
    try:
        yield
    except LedgerError as error:
        text = str(error)
        if without_examples:
            calls = "; ".join(f"{n or 'the model'} ({s})" for n, s in without_examples.items())
            hint = (
                f"The ledger expects tensors with a row for each example, but these modules were "
                f"called without any: {calls}. Call the model as a whole, as one nn.Module, or say "
                f"how many examples there are: ab.observe(model, examples=B)."
            )
        elif not has_dim:
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
