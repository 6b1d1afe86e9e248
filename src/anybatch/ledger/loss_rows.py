"""Whether a loss is a mean over another dimension than that of the examples.

    outputs [T, B, k],    losses [B] = f(outputs),    loss = mean of the losses

The losses are the last tensor with several elements on the way to the loss. Where the gradient of
each reaches one place along dimension 1 of the outputs, and several along dimension 0, the examples
lie along dimension 1.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from anybatch.errors import LedgerError
from anybatch.ledger.micro_batches import MicroBatch, marked_micro_batch

__all__ = ["refuse_other_dimension"]


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
