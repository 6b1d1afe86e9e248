"""Forward and backward over the parts of a share.

    direct      the batch is one part: forward, R, backward with c
    one pass    R linear: forward and backward for each part, with c as far as it is known (`seed`)
    two passes  forward for all parts without a graph, R; then forward and backward with c

Backward with c is the gradient of sum_i c_i v_i, the v_i of a part being in one graph.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import distributed, pytree
from anybatch._torch import multiply_in_place, run_backward
from anybatch.distributed import fsdp
from anybatch.errors import LossError, ModelError
from anybatch.example_losses import Losses, concatenate_losses
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.attempts import Again, NeedsGraph
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.draws import Draws
from anybatch.gradient.finite import check_finite
from anybatch.gradient.forward_writes import copy_of, fresh_containers
from anybatch.gradient.leaves import check_leaves
from anybatch.gradient.seed import seed_of
from anybatch.gradient.update import Idle, Update
from anybatch.kernels.operations import choose_kernels
from anybatch.layout import MicroBatch, ShareRange
from anybatch.ledger.plain_autograd import OneByOne
from anybatch.ledger.watched_pass import WatchedPass, convert_errors, disable_compile
from anybatch.precision import autocast
from anybatch.randomness import preserve_generators
from anybatch.reductions import Reduced

__all__ = ["Cut", "Outcome", "run"]

Coefficients = Mapping[str, Tensor]
Weigh = Callable[[MicroBatch, Losses], "Weighed"]
Watched = WatchedPass | OneByOne
Sweep = Callable[..., "Swept"]  # (weigh, only=None)
Cut = Callable[[], list[MicroBatch]]


class Weighed(NamedTuple):
    """Weights of a part's examples on their way back."""

    coefficients: Coefficients
    scale: float  # factor that its gradient is multiplied by before it is added up


class Swept(NamedTuple):
    """What a rank has seen in going over its parts."""

    losses: Losses  # of the share; empty where it is, or where they are known
    ids: Tensor | None
    has_graph: bool | None  # of any loss; None where no backward pass was to be made


@dataclass(frozen=True)
class Outcome:
    """The whole batch's losses, and what each reduction made of them."""

    losses: Losses
    reduced: Mapping[str, Reduced]
    factor: float = 1.0  # what the parts were added up without

    def coefficients(self, start: int, stop: int) -> dict[str, Tensor]:
        """c of a run of examples of the batch, by term."""
        return {
            name: r.coefficients
            if stop - start == len(r.coefficients)
            else r.coefficients[start:stop]
            for name, r in self.reduced.items()
        }


def run(update: Update, cut: Cut, buffers: Buffers, accumulator: Accumulator) -> Outcome:
    """Leave the data term's gradient, summed over all ranks, in the accumulator.

    Args:
        cut: what the parts of this share are; an error of it is one of the pass.
    """
    if update.group is None and len(cut()) == 1 and not update.is_bitwise:
        return _direct(update, cut()[0], buffers, accumulator)

    def sweep(weigh: Weigh | None, **how: Any) -> Swept:
        with accumulator.going_back() if weigh is not None else nullcontext():
            return _sweep(update, buffers, accumulator, cut(), weigh, **how)

    reductions = list(update.objective.reductions.values())
    is_linear = len(reductions) == 1 and reductions[0].factor(1.0, 1) is not None
    update.writes.is_cut = not is_linear or update.group is not None or len(cut()) > 1
    if is_linear:
        return _one_pass(update, sweep, accumulator)
    return _two_passes(update, cut, sweep, accumulator)


def _direct(
    update: Update, part: MicroBatch, buffers: Buffers, accumulator: Accumulator
) -> Outcome:
    with torch.enable_grad(), Draws(update, part):
        losses, watched = _forward(update, part, goes_back=True)
        buffers.collect(part, 1.0)
        outcome = _reduce(update, [Swept(_kept(update, losses), update.ids, None)])
        coefficients = outcome.coefficients(part.start, part.stop)
        accumulator.begin()
        has_graph = _backward(update, losses, coefficients, watched)
        accumulator.add(part)
    accumulator.finish()
    _check_graph([Swept({}, None, has_graph)])
    return outcome


def _one_pass(update: Update, sweep: Sweep, accumulator: Accumulator) -> Outcome:
    (name, reduction) = next(iter(update.objective.reductions.items()))
    is_in_step = bool(update.survey.units)  # ranks go through a sharded model together

    def weigh(part: MicroBatch, losses: Losses) -> Weighed:
        term = losses[name]
        seed = seed_of(update.place.total, reduction, term, is_common=is_in_step)
        own = torch.full_like(term.values, seed)
        if term.counts is None:
            return Weighed({name: own}, 1.0)
        return Weighed({name: torch.where(term.present, own, 0)}, 1.0 if is_in_step else 1 / seed)

    told = _told(update, lambda: sweep(weigh))
    _check_graph(told)
    outcome = _reduce(update, told)
    accumulator.sum_over_ranks()
    term = outcome.losses[name]
    if term.counts is not None:
        factor = reduction.factor(term.counts.double().sum().item(), len(term.values))
        assert factor is not None
        if is_in_step:
            factor /= seed_of(update.place.total, reduction, term, is_common=True)
        multiply_in_place(list(accumulator.sums.values()), factor)
        outcome = replace(outcome, factor=factor)
    return outcome


def _two_passes(update: Update, cut: Cut, sweep: Sweep, accumulator: Accumulator) -> Outcome:
    told = _told(update, lambda: sweep(None))
    outcome = _reduce(update, told)
    start = update.place.start

    def coefficients(part: MicroBatch) -> Coefficients:
        return outcome.coefficients(start + part.start, start + part.stop)

    def weigh(part: MicroBatch, losses: Losses) -> Weighed:
        _check_second_pass(update, part, losses, outcome.losses)
        return Weighed(coefficients(part), 1.0)

    # A grain of which no example counts can be left out too: none couples beyond it.
    # The ledger shows every example, and ranks that hold a model in shards go on together.
    is_needed = update.watch is not None or bool(update.survey.units)
    needed = {p for p in cut() if is_needed or any(bool(c.any()) for c in coefficients(p).values())}
    told = _told(update, lambda: sweep(weigh, only=needed))
    _check_graph(told)
    accumulator.sum_over_ranks()
    return outcome


def _check_second_pass(update: Update, part: MicroBatch, losses: Losses, first: Losses) -> None:
    """Refuse losses that are others in the second pass: the coefficients belong to the first.

    Raises:
        ModelError: they differ by more than rounding.
    """
    start, stop = update.place.start + part.start, update.place.start + part.stop
    slack = 1e-3 if update.precision == "float32" else 0.1
    for name, term in losses.items():
        before = first[name].values[start:stop].to(term.values.device)
        scale = before.abs().mean().item()
        if not torch.allclose(term.values, before, slack, slack * scale, equal_nan=True):
            raise ModelError(
                f"The reduction needs two forward passes, and the second gave other losses in "
                f"the term {name!r} than the first, on the same examples. Something in the model "
                f"or in example_losses changes from call to call: a counter, a hidden state, a "
                f"parameter. Change it between updates, or run the batch uncut."
            )


def _sweep(
    update: Update,
    buffers: Buffers,
    accumulator: Accumulator,
    parts: list[MicroBatch],
    weigh: Weigh | None,
    *,
    only: Collection[MicroBatch] | None = None,
) -> Swept:
    """Forward for each part, and backward with c = weigh(part, losses) if given.

    Every part starts from the buffers of before. A second sweep, of `only` those parts that have
    a gradient, leaves no more in them, and returns no losses.
    """
    pieces, reaches = [], None
    for part in parts:
        accumulator.discard()  # what user code may have left there
        if only is not None and part not in only:
            accumulator.add(part)  # nothing, which is a leaf of the tree too
            continue
        buffers.restore()
        has_graph = weigh is not None or update.facts.needs_graph
        with torch.set_grad_enabled(has_graph), Draws(update, part):
            losses, watched = _forward(update, part, goes_back=weigh is not None)
            if only is None:
                pieces.append(_kept(update, losses))
                buffers.collect(part, (part.stop - part.start) / update.place.total)
            if weigh is not None:  # checkpointing runs forward again in it: buffers come before
                coefficients, scale = weigh(part, losses)
                accumulator.begin(scale)
                has_own = _backward(update, losses, coefficients, watched, scale)
                reaches = has_own or bool(reaches)
                accumulator.add(part)
    if update.idle is not None:
        _idle(update, update.idle, accumulator, goes_back=weigh is not None)
    if weigh is not None:
        accumulator.finish()
    return Swept(concatenate_losses(pieces) if pieces else {}, update.ids, reaches)


def _told(update: Update, sweep: Callable[[], Swept]) -> list[Swept]:
    """What all ranks have seen."""
    if not update.survey.units:
        return distributed.all_gather_object(sweep, update.group)

    def swept() -> Swept | Again:
        try:
            return sweep()
        except Again as again:  # on all ranks, after the same part
            return again

    told = fsdp.gather_through_model(swept, update.group)
    seen = [one for one in told if not isinstance(one, Again)]
    for one in told:
        if isinstance(one, Again):
            raise one
    return seen


def _idle(update: Update, idle: Idle, accumulator: Accumulator, *, goes_back: bool) -> None:
    """Passes that count for nothing, in which other ranks need this one's part of the model."""
    whole, place = MicroBatch(0, idle.size), ShareRange(0, idle.size, idle.size)
    alone = replace(update, share=idle.share, place=place)
    has_graph = goes_back or update.facts.needs_graph
    with preserve_generators(update.device), torch.set_grad_enabled(has_graph):
        for _ in range(idle.passes):
            with Draws(alone, whole) if update.find_grain_reason() is None else nullcontext():
                losses, _ = _forward(alone, whole, goes_back=goes_back)
                if goes_back:
                    nothing = {name: torch.zeros_like(t.values) for name, t in losses.items()}
                    accumulator.begin()
                    _backward(alone, losses, nothing, None)
                    accumulator.add(whole)


def _forward(update: Update, part: MicroBatch, *, goes_back: bool) -> tuple[Losses, Watched | None]:
    """Compute the losses of a part, and the ledger's view of it where a backward pass follows.

    Raises:
        NeedsGraph: the losses contain derivatives, and the pass had no graph.
    """
    size = part.stop - part.start
    watched = update.watch.begin(size) if update.watch is not None and goes_back else None
    piece = _piece(update, part)
    is_copy = not goes_back or update.is_first  # another pass may follow over the same examples
    if is_copy:
        piece = copy_of(piece)
    update.writes.begin(piece, is_copy=is_copy)
    try:
        as_written = nullcontext() if watched is None else disable_compile()
        mode = _mode(update, watched, size)
        with as_written, _failures(watched), mode, autocast(update.precision, update.device):
            returned = update.objective.call(update.model, piece)
    except RuntimeError as error:
        if torch.is_grad_enabled():
            raise
        raise NeedsGraph from error
    update.writes.end()
    return update.objective.check(returned, size), watched


def _piece(update: Update, part: MicroBatch) -> Any:
    """Take the examples of a part out of the share, as the model gets them."""
    piece = update.share
    if part.stop - part.start < update.place.stop - update.place.start:
        piece = pytree.take_examples(piece, part.start, part.stop)
    return fresh_containers(pytree.prepare_batch(piece, update.device))


def _mode(update: Update, watched: Watched | None, size: int) -> AbstractContextManager[Any]:
    """Choose who looks at the operations of a forward pass: the ledger, or faster kernels."""
    if watched is not None:
        return watched.mode
    if update.survey.units:  # its parameters are others in each pass
        return nullcontext()
    return choose_kernels(update.model, update.survey.mode, size, torch.is_grad_enabled())


def _failures(watched: Watched | None) -> AbstractContextManager[None]:
    """Name operations that fail while the ledger takes them apart."""
    return convert_errors() if isinstance(watched, WatchedPass) else nullcontext()


def _backward(
    update: Update,
    losses: Losses,
    coefficients: Coefficients,
    watched: Watched | None,
    scale: float = 1.0,
) -> bool:
    """Add sum_i c_i grad v_i, times the loss scale, to `.grad`.

    Args:
        scale: factor by which the accumulator multiplies what comes.

    Returns:
        Whether any loss has a graph.
    """
    if not (update.facts.is_graph_known or update.survey.units):
        check_leaves(update, [term.values for term in losses.values()])
        update.facts.is_graph_known = True
    hooks = nullcontext() if update.hooks is None else update.hooks.set_aside()
    outside = update.outside_gradients_kept() if update.facts.outside else nullcontext()
    with hooks, outside:
        if update.watch is not None and watched is not None:
            with disable_compile(), _failures(watched):
                has_graph = update.watch.backward(watched, losses, coefficients, scale)
        else:
            has_graph = _run_backward(update, losses, coefficients)
    if update.grain_norms is not None:
        update.grain_norms.note(scale)
    return has_graph


def _run_backward(update: Update, losses: Losses, coefficients: Coefficients) -> bool:
    reached = [(term.values, coefficients[name]) for name, term in losses.items()]
    reached = [(v, c.to(v.device, v.dtype)) for v, c in reached if v.requires_grad]
    if update.loss_scale != 1:
        reached = [(v, update.loss_scale * c) for v, c in reached]
    if reached:
        values, weights = zip(*reached, strict=True)
        run_backward(values, weights, False, False, (), True, True)
    return bool(reached)


def _check_graph(told: list[Swept]) -> None:
    """Refuse a batch of which no loss depends on a parameter, as `loss.backward()` would."""
    passes = [swept.has_graph for swept in told if swept.has_graph is not None]
    if passes and not any(passes):
        raise LossError(
            "no loss of the batch depends on a trainable parameter, expected a graph to go back "
            "through. Is the model called under torch.no_grad(), or its output detached?"
        )


def _reduce(update: Update, told: list[Swept]) -> Outcome:
    """Reduce what all ranks hold, in their order."""
    held = [swept for swept in told if swept.losses]
    losses = concatenate_losses([swept.losses for swept in held])
    reduced = update.objective.reduce(losses, update.states)
    for name, r in reduced.items():
        check_finite(name, losses[name], r, [swept.ids for swept in held])
    return Outcome(losses, reduced)


def _kept(update: Update, losses: Losses) -> Losses:
    """Losses without their graph; on the CPU where they travel to other ranks, or might."""

    def keep(tensor: Tensor) -> Tensor:
        stays = update.group is None and not update.is_bitwise
        return tensor.detach() if stays else tensor.detach().cpu()

    return {name: term.map(keep) for name, term in losses.items()}
