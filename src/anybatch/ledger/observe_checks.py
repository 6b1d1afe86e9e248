"""Placements in a loop of one's own, confirmed on the graph of the step itself.

From the outputs of chosen examples a pass goes back, along weights of its own; no row of another
example may get a gradient. Any two examples are told apart by a bit of their number, so that
2 log2 B passes say it of all.

Whether a loss is a mean over another dimension than that of the examples.

    outputs [T, B, k],    losses [B] = f(outputs),    loss = mean of the losses

The losses are the last tensor with several elements on the way to the loss. Where the gradient of
each reaches one place along dimension 1 of the outputs, and several along dimension 0, the examples
lie along dimension 1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward

from anybatch.errors import LedgerError
from anybatch.ledger.contractions.placement import Placement, agrees
from anybatch.ledger.intercept import Meeting
from anybatch.ledger.observe_forward import Arrival, Arrived, Loop, Target
from anybatch.ledger.observe_micro_batches import MicroBatch, Output, marked_micro_batch
from anybatch.ledger.observe_modules import place_rows, spread
from anybatch.ledger.row_owners import halves
from anybatch.ledger.watched_pass import misplaced

__all__ = ["confirm", "refuse_other_dimension"]

Chosen = Mapping[MicroBatch, Tensor]
Arriving = Callable[[Arrival], AbstractContextManager[None]]
"""The context in which gradients go to a receiver."""


def confirm(loop: Loop, reached: Iterable[MicroBatch], arriving: Arriving) -> None:
    """See that the examples of micro-batches reach their own rows alone.

    Operations outside of any module are confirmed by themselves: a loss may mix examples there.

    Raises:
        LedgerError: a row that another example reaches, or no output to begin with.
    """
    noted = {id(o): o for m in reached for o in m.outputs}.values()
    outputs = [o for o in noted if _place(loop, o) is not None]
    try:
        if outputs and (loop.is_unsure or not _repeats_hidden_passes(outputs)):
            _confirm_outputs(loop, outputs, arriving)
    except RuntimeError as error:  # the graph allows one pass only
        outputs, cause = [], f": {error}"
    else:
        cause = ", since no output of the modules that were called has a row for each example"
    if not outputs and loop.is_unsure and any(m.size > 1 for m in reached):
        raise LedgerError(
            f"the ledger cannot confirm which example each row belongs to{cause}. Return an output "
            f"with a row for each example from the modules, or say how many examples there are and "
            f"along which dimension: ab.observe(model, examples=B, dim=1)."
        )
    for plan in loop.plans.values():
        plan.unsure.clear()


def _confirm_outputs(loop: Loop, outputs: list[Output], arriving: Arriving) -> None:
    numbered = sorted({m.root for o in outputs for m in o.target}, key=lambda m: m.number)
    sizes = [m.size for m in numbered]
    if sum(sizes) == 1:
        return
    with _others_put_aside(outputs):
        for choice in halves(sum(sizes), outputs[0].like.device):
            chosen = dict(zip(numbered, torch.split(choice, sizes), strict=True))
            for is_outside in (False, True):
                own = [o for o in outputs if o.is_outside is is_outside]
                _probe(loop, arriving, own, chosen)


def _repeats_hidden_passes(outputs: list[Output]) -> bool:
    """Whether reentrant checkpointing hides a part of the graph, with leaves of others in it."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(outputs))


def _probe(loop: Loop, arriving: Arriving, outputs: list[Output], chosen: Chosen) -> None:
    wrong: dict[Meeting, Placement] = {}

    def arrive(arrived: Arrived) -> None:
        target, placement, d = arrived.target, arrived.placement, arrived.d
        if not all(m.root in chosen for m in target) or outputs[0].is_outside > arrived.is_outside:
            return
        if agrees(placement, d, _rows(target, chosen).to(d.device)):
            return
        if bool(d.isfinite().all()):  # 0 times infinity tells nothing
            wrong[arrived.meeting] = placement

    if outputs:
        starts = tuple(_start(loop, output, chosen) for output in outputs)
        with arriving(arrive):
            edges = tuple(output.edge for output in outputs)
            _engine_run_backward(edges, starts, True, False, (), True, True)
    for meeting, placement in wrong.items():
        for plan in loop.plans.values():
            if meeting in plan.chosen:
                plan.reject(meeting, placement)
        raise misplaced(meeting, placement)


def _rows(target: Target, chosen: Chosen) -> Tensor:
    """Which examples of a target are chosen."""
    return torch.cat([chosen[m.root] for m in target])


def _place(loop: Loop, output: Output) -> tuple[int, int] | None:
    return place_rows(tuple(output.shape), sum(m.size for m in output.target), loop.dim)


def _start(loop: Loop, output: Output, chosen: Chosen) -> Tensor:
    """The gradient of an output with which a pass begins: 0 but for chosen examples."""
    k, each = _place(loop, output) or (0, 1)
    rows = _rows(output.target, chosen).repeat_interleave(each)
    shape = [1] * len(output.shape)
    shape[k] = len(rows)
    weights = spread(tuple(output.shape), output.like)
    return weights * rows.to(output.like.device).view(shape)


@contextmanager
def _others_put_aside(outputs: list[Output]) -> Iterator[None]:
    """Leave `.grad` of all tensors that a pass from some outputs reaches as it was."""
    leaves = [node.variable for node in _nodes(outputs) if hasattr(node, "variable")]
    if any(leaf._post_accumulate_grad_hooks for leaf in leaves):
        raise LedgerError(
            "a tensor outside of the observed model has a post-accumulate-grad hook, which the "
            "passes that confirm the ledger would run. Remove the hook, or compute what it belongs "
            "to under torch.no_grad()."
        )
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad


def _nodes(outputs: list[Output]) -> Iterator[Any]:
    todo: list[Any] = [output.edge.node for output in outputs]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [parent for parent, _ in node.next_functions]


def refuse_other_dimension(loss: Tensor, key: object) -> None:
    """See that a loss is no mean over the second or a later dimension of the model's inputs.

    Raises:
        LedgerError: it is.
    """
    if loss.numel() != 1 or loss.grad_fn is None:
        return
    for losses in _reduced(loss.grad_fn):
        shape = _shape(losses)
        if len(shape) != 1:
            continue
        for output, micro_batch in _outputs(losses.node, key):
            dims = _candidates(_shape(output), micro_batch.input_shape, shape[0])
            found = _dimension(losses, output, dims)
            if found is not None:
                raise LedgerError(
                    f"the loss is a sum or mean over {shape[0]} values, one for each place along "
                    f"dimension {found} of the outputs of shape {tuple(_shape(output))}, but the "
                    f"ledger takes the {micro_batch.size} places along dimension 0 for examples. "
                    f"If the examples lie along dimension {found}, say ab.observe(model, "
                    f"dim={found}). If not, say dim=0."
                )


def _candidates(output: torch.Size, inputs: torch.Size, num_losses: int) -> list[int]:
    """The dimensions that inputs and outputs share, with as many places as there are losses."""
    both = range(1, min(len(output), len(inputs)))
    return [k for k in both if output[k] == inputs[k] == num_losses]


def _dimension(losses: GradientEdge, output: GradientEdge, dims: list[int]) -> int | None:
    """The dimension of an output along which each loss has a place; None: the first has."""
    if not dims:
        return None
    num_losses = _shape(losses)[0]
    places: dict[int, set[bool]] = {k: set() for k in (0, *dims)}
    kind = _metadata(losses)
    for j in (0, num_losses - 1):
        start = torch.zeros(num_losses, dtype=kind.dtype, device=kind.device)
        start[j] = 1
        found = torch.autograd.grad(losses, [output], start, retain_graph=True, allow_unused=True)
        d: Tensor | None = found[0]
        if d is None:
            return None
        for k, is_alone in places.items():
            reached = d.movedim(k, 0).reshape(d.shape[k], -1).any(1).nonzero().flatten().tolist()
            is_alone.add(reached == [j])
    if places[0] == {True}:
        return None
    return next((k for k in dims if places[k] == {True}), None)


def _reduced(node: Any) -> Iterator[GradientEdge]:
    """The first tensors of several elements on the way from a loss to its inputs."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent, number in node.next_functions:
            if parent is None:
                continue
            edge = GradientEdge(parent, number)
            if _shape(edge).numel() == 1:
                todo.append(parent)
            else:
                yield edge


def _outputs(node: Any, key: object) -> Iterator[tuple[GradientEdge, MicroBatch]]:
    """The nearest outputs of calls from which losses were made, one micro-batch each."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        micro_batch = marked_micro_batch(node, key)
        if micro_batch is None:
            todo += [parent for parent, _ in node.next_functions]
        else:
            yield GradientEdge(node, 0), micro_batch


def _shape(edge: GradientEdge) -> torch.Size:
    return torch.Size(_metadata(edge).shape)


def _metadata(edge: GradientEdge) -> Any:
    """Shape, type and device of the tensor that an edge belongs to."""
    return edge.node._input_metadata[edge.output_nr]
