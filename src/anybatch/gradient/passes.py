"""Passes of one rank over its micro-batches, and the running sum of their gradients.

forward     v_i = example_losses(model, micro-batch)
backward    .grad += sum_i c_i grad v_i,    c_i the weights that the caller chooses
add         sum += .grad, in at least float32, rounded once to the parameter's type

Ranks are summed afterwards, in an order that depends on both. `tree_accumulator` holds the sum in
a fixed order.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch._torch import multiply_in_place
from anybatch._torch import run_backward as run_engine_backward
from anybatch.distributed import ProcessGroup
from anybatch.errors import ModelError
from anybatch.example_losses import Losses, concatenate_losses, list_outputs
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.closures import check_leaves
from anybatch.gradient.survey import NewFact
from anybatch.gradient.update import ObservedPass, Outcome, PaddingPasses, Update
from anybatch.kernels.operations import choose_kernels
from anybatch.layout import MicroBatch, ShareRange
from anybatch.ledger.graph_pass import GraphPass
from anybatch.ledger.trial_run import convert_errors, disable_compile
from anybatch.ledger.watched_pass import WatchedPass
from anybatch.precision import autocast
from anybatch.pytree import open_batch, sum_versions
from anybatch.randomness import DrawControl, preserve_generators

__all__ = [
    "Accumulator",
    "Cut",
    "Sweep",
    "Weights",
    "find_wide_type",
    "make_zeros",
    "run_engine",
    "sweep",
    "to_wide",
]

Cut = Callable[[], list[MicroBatch]]

_NO_CONTEXT = nullcontext()


class Weights(NamedTuple):
    """Weights of a micro-batch's examples in its backward pass."""

    coefficients: Mapping[str, Tensor]
    scale: float = 1.0  # its gradient is multiplied by this before it is added to the sum
    outcome: Outcome | None = None  # if the micro-batch is the whole batch


Weigh = Callable[[MicroBatch, Losses], Weights]


class Sweep(NamedTuple):
    """Result of the passes over all micro-batches of a rank."""

    losses: Losses  # of the share; empty if the share is, or if they are already known
    ids: Tensor | None
    has_graph: bool | None  # whether any loss has a graph; None: there was no backward pass
    outcome: Outcome | None


class Accumulator:
    """Running sum of the gradients that backward passes leave in `.grad`.

    During a backward pass the sums are in `.grad`, and autograd adds to them in place. At any
    other time they are stored here: a forward pass is the user's code, which may read `.grad`, or
    fill it by a backward pass of its own.

    Args:
        parameters: those to take gradients of, by name.
        group: the ranks whose sums are added up; None: this process alone.
        is_separate: whether `.grad` must hold one micro-batch's gradient alone after its pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: ProcessGroup | None = None,
        *,
        is_separate: bool = False,
    ) -> None:
        self._parameters, self._group, self._is_separate = parameters, group, is_separate
        self.sums: dict[str, Tensor] = {}
        """By name, in the order of the parameters, once `finish` has been called."""
        self._scale = 1.0

    def clear(self) -> None:
        """Drop all sums."""
        self.sums, self._scale = {}, 1.0
        self.discard()

    def discard(self) -> None:
        """Drop the content of `.grad`, which user code may have filled."""
        for p in self._parameters.values():
            p.grad = None

    def begin(self, scale: float = 1.0) -> None:
        """Prepare for the backward pass of one micro-batch.

        Args:
            scale: factor of its gradient in the sum; a power of two, or the same for all.
        """
        if scale != self._scale and self.sums:  # the sums are multiples of the last scale
            multiply_in_place(list(self.sums.values()), self._scale / scale)
        self._scale = scale
        for name, p in self._parameters.items():
            p.grad = None
            if not self._is_separate and name in self.sums and self.sums[name].dtype == p.dtype:
                p.grad = self.sums.pop(name)

    def backward_passes(self) -> AbstractContextManager[None]:
        """Surround the backward passes of all micro-batches of this rank."""
        return _NO_CONTEXT

    def add(self, micro_batch: MicroBatch) -> None:
        """Move a micro-batch's gradient from `.grad` to the sums."""
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            gradient, p.grad = p.grad, None
            if not (gradient.layout == torch.strided and gradient.itemsize >= 4):
                gradient = to_wide(name, gradient)
            elif gradient.is_conj():  # a lazy conjugate of autograd's has no real parts
                gradient = gradient.resolve_conj()
            self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient

    def finish(self) -> None:
        """Complete the sums, with zeros for parameters that no gradient has reached."""
        sums = self.sums
        if self._scale != 1 and sums:
            multiply_in_place(list(sums.values()), self._scale)
        self.sums = {}
        for name, p in self._parameters.items():
            self.sums[name] = sums[name] if name in sums else make_zeros(p)

    def sum_over_ranks(self) -> None:
        """Add up the sums of all ranks; once, and after `finish`."""
        if self._group is not None:
            distributed.all_reduce_sum(list(self.sums.values()), self._group)

    def deliver(self) -> None:
        """Leave the sums in `.grad`."""
        for name, p in self._parameters.items():
            gradient = self.sums[name]
            p.grad = gradient if gradient.dtype == p.dtype else gradient.to(p.dtype)


def sweep(
    update: Update,
    cut: Cut,
    buffers: Buffers | None,
    accumulator: Accumulator,
    weigh: Weigh | None,
    *,
    only: Collection[MicroBatch] | None = None,
) -> Sweep:
    """Run each micro-batch forward, and backward with the weights of `weigh` if there is one.

    Every micro-batch starts from the buffers before the update.

    Args:
        cut: lists the micro-batches of this share.
        buffers: collects the model's buffers; None: it has none.
        only: the micro-batches of a second sweep, which collects neither buffers nor losses.
    """
    pieces: list[Losses] = []
    has_graph, outcome, goes_back = None, None, weigh is not None
    with accumulator.backward_passes() if goes_back else _NO_CONTEXT, _see_operations(update):
        for micro_batch in cut():
            accumulator.discard()
            if only is not None and micro_batch not in only:
                accumulator.add(micro_batch)  # zeros, which are a leaf of the tree too
                continue
            if buffers is not None:
                buffers.restore()
            has_grad = goes_back or update.facts.needs_graph
            with _set_gradients(has_grad), _control_draws(update, micro_batch):
                losses, watched = run_forward(update, micro_batch, goes_back=goes_back)
                detached = _detach(update, losses)
                if only is None:
                    pieces.append(detached)
                    _collect(update, micro_batch, losses, buffers)
                if weigh is not None:
                    coefficients, scale, outcome = weigh(micro_batch, detached)
                    accumulator.begin(scale)
                    reaches = run_backward(update, losses, coefficients, watched, scale)
                    has_graph = reaches or bool(has_graph)
            if goes_back:
                accumulator.add(micro_batch)
        if update.padding is not None:
            _run_padding(update, update.padding, accumulator, goes_back=goes_back)
        if goes_back:
            accumulator.finish()
    losses = {} if outcome or not pieces else concatenate_losses(pieces)
    return Sweep(losses, update.ids, has_graph, outcome)


def _see_operations(update: Update) -> AbstractContextManager[object]:
    """Let compiled code run as Python if the ledger watches its operations."""
    is_watched = update.observation is not None and not update.observation.reads_graph
    return disable_compile() if is_watched else _NO_CONTEXT


def _set_gradients(enabled: bool) -> AbstractContextManager[None]:
    """Enable or disable gradients, if they are not so already."""
    is_set = enabled == torch.is_grad_enabled()
    return _NO_CONTEXT if is_set else torch.set_grad_enabled(enabled)


def _control_draws(update: Update, micro_batch: MicroBatch) -> AbstractContextManager[None]:
    """Seed the generators by the grain of a micro-batch. Without a key, detect draws."""
    seed = None
    if update.key is not None and micro_batch.grain is not None:
        seed = update.key.grain(micro_batch.grain)
    # NumPy and `random` take longer to compare. They are left out once an update drew nothing.
    others = update.facts.draws is not False
    return DrawControl(update.device, seed, others=others, error=NewFact("draws"))


def _detach(update: Update, losses: Losses) -> Losses:
    """Detach losses, and move them to the CPU if they travel to other ranks, or might."""
    detached = {}
    for name, term in losses.items():
        detached[name] = term.map(torch.detach)
        if update.group is not None or update.is_bitwise:
            detached[name] = detached[name].map(Tensor.cpu)
    return detached


def _collect(
    update: Update, micro_batch: MicroBatch, losses: Losses, buffers: Buffers | None
) -> None:
    """Collect outputs and buffers at once: activation checkpointing runs forward again later."""
    for term in losses.values():
        if term.outputs:
            update.outputs.append(list_outputs(losses))
            break
    if buffers is not None:
        buffers.collect(micro_batch, micro_batch.size / update.share_range.total)


def run_forward(
    update: Update, micro_batch: MicroBatch, *, goes_back: bool
) -> tuple[Losses, ObservedPass | None]:
    """Compute the losses of a micro-batch, and watch the pass if the update is observed.

    Args:
        goes_back: whether a backward pass follows.

    Raises:
        NewFact: the losses contain derivatives, and the pass had no graph.
    """
    watched, (start, stop, _) = None, micro_batch
    if goes_back and update.observation is not None:
        watched = update.observation.begin(stop - start)
    is_whole = stop - start == update.share_range.stop - update.share_range.start
    # If another pass may follow over the same examples, this one gets a copy.
    is_copy = not goes_back or (update.facts.draws is None and update.survey.layer is None)
    piece = None if is_whole else (start, stop)
    batch, leaves, versions = open_batch(update.share, piece, update.device, copies=is_copy)
    if update.writes.is_cut:
        update.writes.begin()
    is_unwatched = watched is None or isinstance(watched, GraphPass)
    is_plain = is_unwatched and update.precision == "float32" and not update.has_kernels
    context = _NO_CONTEXT if is_plain else _forward_context(update, watched, stop - start)
    try:
        with context:
            returned = update.objective.call(update.model, batch)
    except RuntimeError as error:
        if torch.is_grad_enabled():
            raise
        raise NewFact("needs_graph") from error
    losses = update.objective.check(returned, stop - start)
    if sum_versions(leaves) != versions:
        update.writes.has_changed_batch = update.facts.changes_batch = True
    if update.writes.is_cut:
        update.writes.end()
    return losses, watched


@contextmanager
def _forward_context(update: Update, watched: ObservedPass | None, size: int) -> Iterator[None]:
    """Autocast, and let the ledger watch operations or faster kernels replace them."""
    with ExitStack() as stack:
        if watched is not None:
            stack.enter_context(_name_failures(watched))
            stack.enter_context(watched.mode)
        elif not update.survey.units:  # the parameters of a sharded model change in each pass
            is_graph = torch.is_grad_enabled()
            kernels = choose_kernels(update.model, update.survey.mode, size, is_graph)
            stack.enter_context(kernels)
        stack.enter_context(autocast(update.precision, update.device))
        yield


def _name_failures(watched: ObservedPass) -> AbstractContextManager[None]:
    """Name operations that fail while the ledger separates their examples."""
    return convert_errors() if isinstance(watched, WatchedPass) else _NO_CONTEXT


def run_backward(
    update: Update,
    losses: Losses,
    coefficients: Mapping[str, Tensor],
    watched: ObservedPass | None,
    scale: float = 1.0,
) -> bool:
    """Add sum_i c_i grad v_i, times the loss scale, to `.grad`.

    Args:
        scale: factor that the accumulator multiplies this gradient by.

    Returns:
        Whether any loss has a graph.
    """
    if not (update.facts.is_graph_checked or update.survey.units):
        modules = [update.model, *update.facts.list_outside()]
        values = [term.values for term in losses.values()]
        check_leaves(values, modules, update.objective.example_losses)
        update.facts.is_graph_checked = True
    hooks = _NO_CONTEXT if update.hooks is None else update.hooks.disable()
    outside = update.preserve_outside_gradients() if update.facts.outside else _NO_CONTEXT
    with hooks, outside:
        if watched is None or update.observation is None:
            has_graph = run_engine(losses, coefficients, update.loss_scale)
        else:
            with _name_failures(watched):
                has_graph = update.observation.backward(watched, losses, coefficients, scale)
    if update.grain_norms is not None:
        update.grain_norms.append(scale)
    return has_graph


def run_engine(losses: Losses, coefficients: Mapping[str, Tensor], loss_scale: float = 1.0) -> bool:
    """Run autograd's engine from the losses that have a graph; return whether any has."""
    values, gradients = [], []
    for name, term in losses.items():
        v = term.values
        if v.requires_grad:
            c = coefficients[name].to(v.device, v.dtype)
            values.append(v)
            gradients.append(c if loss_scale == 1 else loss_scale * c)
    if values:
        run_engine_backward(tuple(values), tuple(gradients), False, False, (), True, True)
    return bool(values)


def _run_padding(
    update: Update, padding: PaddingPasses, accumulator: Accumulator, *, goes_back: bool
) -> None:
    """Run dummy passes, if other ranks need this one's slice of the model in theirs."""
    micro_batch, size = MicroBatch(0, padding.size), padding.size
    update = replace(update, share=padding.share, share_range=ShareRange(0, size, size))
    is_seeded = update.find_grain_reason() is not None
    needs_graph = goes_back or update.facts.needs_graph
    with preserve_generators(update.device), torch.set_grad_enabled(needs_graph):
        for _ in range(padding.num_passes):
            with _NO_CONTEXT if is_seeded else _control_draws(update, micro_batch):
                losses, _ = run_forward(update, micro_batch, goes_back=goes_back)
                if goes_back:
                    zeros = {name: torch.zeros_like(t.values) for name, t in losses.items()}
                    accumulator.begin()
                    run_backward(update, losses, zeros, None)
                    accumulator.add(micro_batch)


def find_wide_type(p: Tensor) -> torch.dtype:
    """Return the type of a parameter's sums."""
    return torch.promote_types(p.dtype, torch.float32)


def make_zeros(p: Tensor) -> Tensor:
    """Make the sum for a parameter that no gradient has reached."""
    return torch.zeros_like(p, dtype=find_wide_type(p))


def to_wide(name: str, gradient: Tensor) -> Tensor:
    """Convert a gradient to at least float32, and refuse a sparse one."""
    if gradient.layout != torch.strided:
        raise ModelError(
            f"The gradient of {name} is sparse. It must be dense: a penalty, a norm and a sum over "
            f"ranks need every element. Use Embedding(..., sparse=False)."
        )
    # Autograd leaves some complex gradients as a lazy conjugate, which has no real parts.
    gradient = gradient.resolve_conj()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
