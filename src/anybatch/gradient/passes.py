"""Forward and backward pass of one micro-batch.

forward     v_i = example_losses(model, micro-batch)
backward    .grad += sum_i c_i grad v_i,    c_i the weights that the caller chooses
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from anybatch._torch import run_backward as run_engine_backward
from anybatch.example_losses import Losses
from anybatch.gradient.closures import check_leaves
from anybatch.gradient.survey import NewFact
from anybatch.gradient.update import ObservedPass, Update
from anybatch.kernels.operations import choose_kernels
from anybatch.layout import MicroBatch
from anybatch.ledger.trial_run import convert_errors, disable_compile
from anybatch.ledger.watched_pass import WatchedPass
from anybatch.precision import autocast
from anybatch.pytree import copy_batch, list_leaves, prepare_batch, sum_versions, take_examples

__all__ = ["run_backward", "run_engine", "run_forward"]


def run_forward(
    update: Update, micro_batch: MicroBatch, *, goes_back: bool
) -> tuple[Losses, ObservedPass | None]:
    """Compute the losses of a micro-batch, and watch the pass if the update is observed.

    Args:
        goes_back: whether a backward pass follows.

    Raises:
        NewFact: the losses contain derivatives, and the pass had no graph.
    """
    watched, batch, (start, stop, _) = None, update.share, micro_batch
    if goes_back and update.observation is not None:
        watched = update.observation.begin(stop - start)
    if stop - start < update.share_range.stop - update.share_range.start:
        batch = take_examples(batch, start, stop)
    batch = prepare_batch(batch, update.device)
    # If another pass may follow over the same examples, this one gets a copy.
    is_copy = not goes_back or (update.facts.draws is None and update.survey.layer is None)
    if is_copy:
        batch = copy_batch(batch)
    leaves = [] if is_copy else list_leaves(batch)
    before = sum_versions(leaves)
    if update.writes.is_cut:
        update.writes.begin()
    is_plain = watched is None and update.precision == "float32" and not update.has_kernels
    context = nullcontext() if is_plain else _forward_context(update, watched, stop - start)
    try:
        with context:
            returned = update.objective.call(update.model, batch)
    except RuntimeError as error:
        if torch.is_grad_enabled():
            raise
        raise NewFact("needs_graph") from error
    losses = update.objective.check(returned, stop - start)
    if sum_versions(leaves) != before:
        update.writes.has_changed_batch = True
    if update.writes.is_cut:
        update.writes.end()
    return losses, watched


@contextmanager
def _forward_context(update: Update, watched: ObservedPass | None, size: int) -> Iterator[None]:
    """Autocast, and let the ledger watch operations or faster kernels replace them."""
    with ExitStack() as stack:
        if watched is not None:
            stack.enter_context(disable_compile())
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
    return convert_errors() if isinstance(watched, WatchedPass) else nullcontext()


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
    hooks = nullcontext() if update.hooks is None else update.hooks.disable()
    outside = update.preserve_outside_gradients() if update.facts.outside else nullcontext()
    with hooks, outside:
        if watched is None or update.observation is None:
            has_graph = run_engine(losses, coefficients, update.loss_scale)
        else:
            with disable_compile(), _name_failures(watched):
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
