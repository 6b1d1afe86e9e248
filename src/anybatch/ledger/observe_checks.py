"""Checks of placements in the user's own loop, on the graph of the step itself.

    outputs of some examples go backward    gradients of the rows of all others must be 0

Each pass begins at outputs of a mask of examples, with weights. A bit of their number separates any
two examples, so 2 log2 B passes test all of them. Another check finds losses that are means over
another dimension than that of the examples:

    outputs [T, B, k],    losses [B] = f(outputs),    loss = mean of the losses

The losses are the last tensor with several elements before the loss. If the gradient of each
reaches one place along dimension 1 of the outputs, and several along dimension 0, the examples lie
along dimension 1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from anybatch._torch import run_backward
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.placement import Placement, Site, is_consistent
from anybatch.ledger.observe_forward import Arrival, ForwardObserver, OnArrival
from anybatch.ledger.observe_micro_batches import MicroBatch, Output, Target, get_single_mark
from anybatch.ledger.observe_modules import locate_examples, make_weights
from anybatch.ledger.row_owners import iterate_masks
from anybatch.ledger.trial_run import iterate_nodes, list_leaves, set_grads_aside

__all__ = ["confirm_placements", "refuse_other_dimension"]

Masks = Mapping[MicroBatch, Tensor]
Arriving = Callable[[OnArrival], AbstractContextManager[None]]
"""Return a context in which gradients go to a function."""


def confirm_placements(
    forward: ForwardObserver, micro_batches: Iterable[MicroBatch], arriving: Arriving
) -> None:
    """Check that the examples of micro-batches reach only their own rows.

    Operations outside of modules are confirmed separately, since a loss can mix examples there.

    Raises:
        LedgerError: an example reaches the row of another, or no output can begin a pass.
    """
    outputs = list({id(o): o for m in micro_batches for o in m.outputs}.values())
    outputs = [o for o in outputs if _locate(forward, o) is not None]
    cause = ", since no output of the modules that were called has a row for each example"
    try:
        if outputs and (forward.is_unsure or not _has_hidden_graph(outputs)):
            _confirm_outputs(forward, outputs, arriving)
    except RuntimeError as error:  # the graph allows one pass only
        outputs, cause = [], f": {error}"
    if not outputs and forward.is_unsure and any(m.size > 1 for m in micro_batches):
        raise LedgerError(
            f"The ledger cannot confirm which example each row belongs to{cause}. Return an output "
            f"with a row for each example from the modules, or say how many examples there are and "
            f"along which dimension: ab.observe(model, examples=B, dim=1)."
        )
    for plan in forward.plans.values():
        plan.unconfirmed.clear()


def _confirm_outputs(forward: ForwardObserver, outputs: list[Output], arriving: Arriving) -> None:
    micro_batches = sorted({m.root for o in outputs for m in o.target}, key=lambda m: m.number)
    sizes = [m.size for m in micro_batches]
    if sum(sizes) == 1:
        return
    with _preserve_grads(outputs):
        for mask in iterate_masks(sum(sizes), outputs[0].like.device):
            masks = dict(zip(micro_batches, torch.split(mask, sizes), strict=True))
            for is_outside in (False, True):
                group = [o for o in outputs if o.is_outside is is_outside]
                if group:
                    _test_masks(forward, arriving, group, masks)


def _has_hidden_graph(outputs: list[Output]) -> bool:
    """Return whether reentrant checkpointing hides a part of the graph and its leaves."""
    nodes = iterate_nodes(output.edge.node for output in outputs)
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes)


def _test_masks(
    forward: ForwardObserver, arriving: Arriving, outputs: list[Output], masks: Masks
) -> None:
    """Go backward from the outputs of masked examples, and refuse gradients of the others."""
    wrong: dict[Site, Placement] = {}

    def receive(arrival: Arrival) -> None:
        target, placement, d = arrival.target, arrival.placement, arrival.d
        if not all(m.root in masks for m in target) or outputs[0].is_outside > arrival.is_outside:
            return
        is_right = is_consistent(placement, d, _join_masks(target, masks).to(d.device))
        if not is_right and bool(d.isfinite().all()):  # 0 times infinity shows nothing
            wrong[arrival.sites[0]] = placement

    starts = tuple(_make_start(forward, output, masks) for output in outputs)
    with arriving(receive):
        edges = tuple(output.edge for output in outputs)
        run_backward(edges, starts, True, False, (), True, True)
    for site, placement in wrong.items():
        for plan in forward.plans.values():
            if site in plan.placements:
                plan.reject(site, placement)
        raise LedgerError(
            f"Losses of some examples reach rows of others at the {site}, whose examples are taken "
            f"to be at {placement}. If the model takes this path for the first time, take the step "
            f"again; the ledger then looks for the examples elsewhere. If not, rows are mixed "
            f"there (packed, routed, sorted). Keep examples along a dimension of their own, or "
            f"leave the model unobserved."
        )


def _join_masks(target: Target, masks: Masks) -> Tensor:
    return torch.cat([masks[m.root] for m in target])


def _locate(forward: ForwardObserver, output: Output) -> tuple[int, int] | None:
    size = sum(m.size for m in output.target)
    return locate_examples(tuple(output.shape), size, forward.dim)


def _make_start(forward: ForwardObserver, output: Output, masks: Masks) -> Tensor:
    """Make the gradient with which a pass begins at an output: weights of the masked examples."""
    k, each = _locate(forward, output) or (0, 1)
    rows = _join_masks(output.target, masks).repeat_interleave(each)
    shape = [1] * len(output.shape)
    shape[k] = len(rows)
    weights = make_weights(tuple(output.shape), output.like)
    return weights * rows.to(output.like.device).view(shape)


def _preserve_grads(outputs: list[Output]) -> AbstractContextManager[None]:
    """Restore `.grad` of all tensors that a pass from some outputs reaches."""
    leaves = list_leaves(output.edge.node for output in outputs)
    if any(leaf._post_accumulate_grad_hooks for leaf in leaves):
        raise LedgerError(
            "A tensor outside of the observed model has a post-accumulate-grad hook, which the "
            "passes that confirm the ledger would run. Remove the hook, or compute what it belongs "
            "to under torch.no_grad()."
        )
    return set_grads_aside(leaves)


def refuse_other_dimension(loss: Tensor, key: object) -> None:
    """Check that a loss is no mean over the second or a later dimension of the model's inputs.

    Args:
        loss: from which the backward pass begins.
        key: of the marks on the graph.
    """
    if loss.numel() != 1 or loss.grad_fn is None:
        return
    for losses in _find_reduced(loss.grad_fn):
        shape = _get_shape(losses)
        if len(shape) != 1:
            continue
        for output, micro_batch in _find_outputs(losses.node, key):
            dims = _list_dimensions(_get_shape(output), micro_batch.input_shape, shape[0])
            dim = _find_dimension(losses, output, dims)
            if dim is not None:
                raise LedgerError(
                    f"The loss is a sum or mean over {shape[0]} values, one for each place along "
                    f"dimension {dim} of the outputs of shape {tuple(_get_shape(output))}. The "
                    f"ledger takes the {micro_batch.size} places along dimension 0 for examples. "
                    f"If the examples lie along dimension {dim}, say ab.observe(model, dim={dim}). "
                    f"If not, say dim=0."
                )


def _list_dimensions(output: torch.Size, inputs: torch.Size, num_losses: int) -> list[int]:
    """List the later dimensions that inputs and outputs share, with a place for each loss."""
    shared = range(1, min(len(output), len(inputs)))
    return [k for k in shared if output[k] == inputs[k] == num_losses]


def _find_dimension(losses: GradientEdge, output: GradientEdge, dims: list[int]) -> int | None:
    """Find the dimension of an output along which each loss has one place; None: the first."""
    if not dims:
        return None
    num_losses = _get_shape(losses)[0]
    results: dict[int, set[bool]] = {k: set() for k in (0, *dims)}
    metadata = _get_metadata(losses)
    for j in (0, num_losses - 1):
        start = torch.zeros(num_losses, dtype=metadata.dtype, device=metadata.device)
        start[j] = 1
        gradients = torch.autograd.grad(
            losses, [output], start, retain_graph=True, allow_unused=True
        )
        d: Tensor | None = gradients[0]
        if d is None:
            return None
        for k, has_one_place in results.items():
            places = d.movedim(k, 0).reshape(d.shape[k], -1).any(1).nonzero().flatten().tolist()
            has_one_place.add(places == [j])
    if results[0] == {True}:
        return None
    return next((k for k in dims if results[k] == {True}), None)


def _find_reduced(node: Any) -> Iterator[GradientEdge]:
    """Yield the first tensors of several elements on the way from a loss to its inputs."""
    todo, visited = [node], set()
    while todo:
        node = todo.pop()
        if node in visited:
            continue
        visited.add(node)
        for parent, number in node.next_functions:
            if parent is None:
                continue
            edge = GradientEdge(parent, number)
            if _get_shape(edge).numel() == 1:
                todo.append(parent)
            else:
                yield edge


def _find_outputs(node: Any, key: object) -> Iterator[tuple[GradientEdge, MicroBatch]]:
    """Yield the nearest outputs of one micro-batch each that losses were computed from."""

    def is_end(node: Any) -> bool:
        return get_single_mark(node, key) is not None

    for output in iterate_nodes([node], is_end=is_end):
        micro_batch = get_single_mark(output, key)
        if micro_batch is not None:
            yield GradientEdge(output, 0), micro_batch


def _get_shape(edge: GradientEdge) -> torch.Size:
    return torch.Size(_get_metadata(edge).shape)


def _get_metadata(edge: GradientEdge) -> Any:
    """Return shape, type and device of the tensor of an edge."""
    return edge.node._input_metadata[edge.output_nr]
