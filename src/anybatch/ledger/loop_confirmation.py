"""Placements in a loop of one's own, confirmed on the graph of the step itself.

From the outputs of chosen examples a pass goes back, along weights of its own; no row of another
example may get a gradient. Any two examples are told apart by a bit of their number, so that
2 log2 B passes say it of all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from anybatch._torch import run_backward
from anybatch.errors import LedgerError
from anybatch.ledger.call_plans import place_rows, spread
from anybatch.ledger.intercept import Meeting
from anybatch.ledger.loop import Arrival, Arrived, Loop, Target
from anybatch.ledger.micro_batches import MicroBatch, Output
from anybatch.ledger.observer import misplaced
from anybatch.ledger.placement import Placement, agrees
from anybatch.ledger.rows import halves

__all__ = ["confirm"]

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
            run_backward(edges, starts, True, False, (), True, True)
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
