"""Forward and backward pass of one micro-batch.

    forward     v_i = example_losses(model, micro-batch)
    backward    .grad += sum_i c_i grad v_i,    c_i the weights that the caller chooses

Random numbers are seeded by the micro-batch's grain. Without a key nothing may be drawn: the states
of the global generators are compared after the passes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from anybatch.example_losses import Losses
from anybatch.gradient.closures import check_leaves
from anybatch.gradient.forward_writes import copy_batch, rebuild_containers
from anybatch.gradient.survey import NewFact
from anybatch.gradient.update import Update, WatchedPass
from anybatch.kernels.operations import fastest_kernels
from anybatch.layout import MicroBatch
from anybatch.ledger.observer import Pass
from anybatch.ledger.unplaced import AsUnplaced, uncompiled
from anybatch.precision import autocast
from anybatch.pytree import prepare_batch, take_examples
from anybatch.randomness import GeneratorStates, seed_generators

__all__ = ["control_draws", "run_backward", "run_engine", "run_forward"]


@contextmanager
def control_draws(update: Update, micro_batch: MicroBatch) -> Iterator[None]:
    """Seed the generators for a grain; if there is no seed, detect draws.

    Raises:
        NewFact: something has drawn random numbers that no key governs.
    """
    if update.key is not None and micro_batch.grain is not None:
        seed_generators(update.key.grain(micro_batch.grain), update.device)
        yield
        return
    # NumPy and `random` take longer to compare. They are left out once an update drew nothing.
    others = update.facts.draws is not False
    states = GeneratorStates.capture(update.device, others=others)
    try:
        yield
    except BaseException:
        states.restore(update.device)
        raise
    if states.has_changed(update.device):
        states.restore(update.device)
        raise NewFact("draws")


def run_forward(
    update: Update, micro_batch: MicroBatch, *, goes_back: bool
) -> tuple[Losses, WatchedPass | None]:
    """Compute the losses of a micro-batch, and watch the pass if the update is observed.

    Args:
        goes_back: whether a backward pass follows.

    Raises:
        NewFact: the losses contain derivatives, and the pass had no graph.
    """
    watched = None
    if goes_back and update.observation is not None:
        watched = update.observation.begin(micro_batch.size)
    batch = update.share
    if micro_batch.size < update.share_range.size:
        batch = take_examples(batch, micro_batch.start, micro_batch.stop)
    batch = rebuild_containers(prepare_batch(batch, update.device))
    # If another pass may follow over the same examples, this one gets a copy.
    is_copy = not goes_back or (update.facts.draws is None and update.survey.layer is None)
    if is_copy:
        batch = copy_batch(batch)
    update.writes.begin(batch, is_copy=is_copy)
    is_plain = watched is None and update.precision == "float32" and not update.has_kernels
    context = nullcontext() if is_plain else _forward_context(update, watched, micro_batch.size)
    try:
        with context:
            returned = update.objective.call(update.model, batch)
    except RuntimeError as error:
        if torch.is_grad_enabled():
            raise
        raise NewFact("needs_graph") from error
    update.writes.end()
    return update.objective.check(returned, micro_batch.size), watched


@contextmanager
def _forward_context(update: Update, watched: WatchedPass | None, size: int) -> Iterator[None]:
    """Autocast, and let the ledger watch operations or faster kernels replace them."""
    with ExitStack() as stack:
        if watched is not None:
            stack.enter_context(uncompiled())
            stack.enter_context(_name_failures(watched))
            stack.enter_context(watched.mode)
        elif not update.survey.units:  # the parameters of a sharded model change in each pass
            is_graph = torch.is_grad_enabled()
            kernels = fastest_kernels(update.model, update.survey.mode, size, is_graph)
            stack.enter_context(kernels)
        stack.enter_context(autocast(update.precision, update.device))
        yield


def _name_failures(watched: WatchedPass) -> AsUnplaced | nullcontext[None]:
    """Name operations that fail while the ledger separates their examples."""
    return AsUnplaced() if isinstance(watched, Pass) else nullcontext()


def run_backward(
    update: Update,
    losses: Losses,
    coefficients: Mapping[str, Tensor],
    watched: WatchedPass | None,
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
    hooks = nullcontext() if update.hooks is None else update.hooks.disable()
    outside = update.preserve_outside_gradients() if update.facts.outside else nullcontext()
    with hooks, outside:
        if watched is None or update.observation is None:
            has_graph = run_engine(losses, coefficients, update.loss_scale)
        else:
            with uncompiled(), _name_failures(watched):
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
        _engine_run_backward(tuple(values), tuple(gradients), False, False, (), True, True)
    return bool(values)
