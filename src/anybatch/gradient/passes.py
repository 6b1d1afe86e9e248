"""Forward and backward over the parts of a share.

    direct      the batch is one part: forward, R, backward with c
    one pass    R linear: backward with 1 for each part, and one division of the sum at the end
    two passes  forward for all parts without a graph, R; then forward and backward with c

Backward with c is the gradient of sum_i c_i v_i, the v_i of a part being in one graph.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import batch as batches
from anybatch import distributed
from anybatch.batch import ExampleLosses
from anybatch.distributed import shards
from anybatch.errors import LossError
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.finite import check_finite
from anybatch.gradient.habits import draws
from anybatch.gradient.result import joined
from anybatch.gradient.update import Idle, Update
from anybatch.layout import Part, Place
from anybatch.ledger.faster import fastest_kernels
from anybatch.ledger.observer import Pass
from anybatch.ledger.one_by_one import OneByOne
from anybatch.ledger.unplaced import naming_failures, uncompiled
from anybatch.objective import Losses
from anybatch.precision import autocast
from anybatch.randomness import States, generators_restored, seed_generators
from anybatch.reductions import Reduced

__all__ = ["Cut", "Drew", "Outcome", "run"]

Coefficients = Mapping[str, Tensor]
Weigh = Callable[[Part, Losses], Coefficients]
Sweep = Callable[..., "Swept"]  # (weigh, only=None)
Cut = Callable[[], list[Part]]


class Drew(Exception):
    """A part drew random numbers that no key governs; nothing has been committed."""


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
        return {name: r.coefficients[start:stop] for name, r in self.reduced.items()}


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
    if len(reductions) == 1 and reductions[0].factor(1.0) is not None:
        return _one_pass(update, sweep, accumulator)
    return _two_passes(update, cut, sweep, accumulator)


def _direct(update: Update, part: Part, buffers: Buffers, accumulator: Accumulator) -> Outcome:
    with torch.enable_grad(), _Draws(update, part):
        losses, watched = _forward(update, part)
        buffers.collect(part, 1.0)
        outcome = _reduce(update, [Swept(_kept(update, losses), update.ids, None)])
        coefficients = outcome.coefficients(part.start, part.stop)
        has_graph = _backward(update, losses, coefficients, watched)
        accumulator.add(part)
    accumulator.finish()
    _check_graph([Swept({}, None, has_graph)])
    return outcome


def _one_pass(update: Update, sweep: Sweep, accumulator: Accumulator) -> Outcome:
    def weigh(part: Part, losses: Losses) -> Coefficients:
        return {name: _ones(term) for name, term in losses.items()}

    told = _told(update, lambda: sweep(weigh))
    _check_graph(told)
    outcome = _reduce(update, told)
    accumulator.sum_over_ranks()
    for name, reduction in update.objective.reductions.items():
        factor = reduction.factor(_total_count(outcome.losses[name]))
        assert factor is not None
        torch._foreach_mul_(list(accumulator.sums.values()), factor)
        outcome = replace(outcome, factor=factor)
    return outcome


def _two_passes(update: Update, cut: Cut, sweep: Sweep, accumulator: Accumulator) -> Outcome:
    told = _told(update, lambda: sweep(None))
    outcome = _reduce(update, told)

    def weigh(part: Part, losses: Losses | None = None) -> Coefficients:
        return outcome.coefficients(update.place.start + part.start, update.place.start + part.stop)

    # A grain of which no example counts can be left out too: none couples beyond it.
    # The ledger shows every example, and ranks that hold a model in shards go on together.
    is_needed = update.watch is not None or bool(update.survey.units)
    needed = {p for p in cut() if is_needed or any(bool(c.any()) for c in weigh(p).values())}
    told = _told(update, lambda: sweep(weigh, only=needed))
    _check_graph(told)
    accumulator.sum_over_ranks()
    return outcome


def _sweep(
    update: Update,
    buffers: Buffers,
    accumulator: Accumulator,
    parts: list[Part],
    weigh: Weigh | None,
    *,
    only: Collection[Part] | None = None,
) -> Swept:
    """Forward for each part, and backward with c = weigh(part, losses) if given.

    Every part starts from the buffers of before. A second sweep, of `only` those parts that have
    a gradient, leaves no more in them, and returns no losses.
    """
    pieces, has_graph = [], None
    for part in parts:
        if only is not None and part not in only:
            accumulator.add(part)  # nothing, which is a leaf of the tree too
            continue
        buffers.restore()
        with torch.set_grad_enabled(weigh is not None), _Draws(update, part):
            losses, watched = _forward(update, part)
            if only is None:
                pieces.append(_kept(update, losses))
                buffers.collect(part, (part.stop - part.start) / update.place.total)
            if weigh is not None:  # checkpointing runs forward again in it: buffers come before
                has_own = _backward(update, losses, weigh(part, losses), watched)
                has_graph = has_own or bool(has_graph)
                accumulator.add(part)
    if update.idle is not None:
        _idle(update, update.idle, accumulator, goes_back=weigh is not None)
    if weigh is not None:
        accumulator.finish()
    return Swept(joined(pieces) if pieces else {}, update.ids, has_graph)


def _told(update: Update, sweep: Callable[[], Swept]) -> list[Swept]:
    """What all ranks have seen."""
    if not update.survey.units:
        return distributed.everywhere(sweep, update.group)

    def swept() -> Swept | Drew:
        try:
            return sweep()
        except Drew as drew:  # on all ranks, after the same part
            return drew

    told = shards.through_layers(swept, update.group)
    seen = [one for one in told if not isinstance(one, Drew)]
    if len(seen) < len(told):
        raise Drew
    return seen


def _idle(update: Update, idle: Idle, accumulator: Accumulator, *, goes_back: bool) -> None:
    """Passes that count for nothing, in which other ranks need this one's part of the model."""
    whole, place = Part(0, idle.size), Place(0, idle.size, idle.size)
    alone = replace(update, share=idle.share, place=place)
    with generators_restored(update.device), torch.set_grad_enabled(goes_back):
        for _ in range(idle.passes):
            with _Draws(alone, whole) if update.why_grains() is None else nullcontext():
                losses, _ = _forward(alone, whole)
                if goes_back:
                    nothing = {name: torch.zeros_like(t.values) for name, t in losses.items()}
                    _backward(alone, losses, nothing, None)
                    accumulator.add(whole)


def _forward(update: Update, part: Part) -> tuple[Losses, Pass | OneByOne | None]:
    """The losses of a part, and the ledger's view of it where there is to be a way back."""
    piece, size = update.share, part.stop - part.start
    if size < update.place.stop - update.place.start:
        piece = batches.take(piece, part.start, part.stop)
    piece = batches.ready(piece, update.device)
    watched = None
    if update.watch is not None and torch.is_grad_enabled():
        watched = update.watch.begin(size)
    how = update.survey.mode, size, torch.is_grad_enabled()
    if watched is not None:
        eyes: AbstractContextManager[Any] = watched.mode
    elif update.survey.units:  # its parameters are others in each pass
        eyes = nullcontext()
    else:
        eyes = fastest_kernels(update.model, *how)
    with _watching(watched), eyes, autocast(update.precision, update.device):
        returned = update.objective.example_losses(update.model, piece)
    return update.objective.checked(returned, size), watched


@contextmanager
def _watching(watched: Pass | OneByOne | None) -> Iterator[None]:
    """Run compiled code as it was written where the ledger watches, and name what fails there."""
    with (
        nullcontext() if watched is None else uncompiled(),
        naming_failures() if isinstance(watched, Pass) else nullcontext(),
    ):
        yield


def _backward(
    update: Update, losses: Losses, coefficients: Coefficients, watched: Pass | OneByOne | None
) -> bool:
    """Add sum_i c_i grad v_i, times the loss scale, to `.grad`; returns whether any loss has a
    graph."""
    with nullcontext() if update.grain_norms is None else update.grain_norms.one():
        return _gone_back(update, losses, coefficients, watched)


def _gone_back(
    update: Update, losses: Losses, coefficients: Coefficients, watched: Pass | OneByOne | None
) -> bool:
    if update.watch is not None and watched is not None:
        with _watching(watched):
            return update.watch.backward(watched, losses, coefficients)
    reached = [(term.values, coefficients[name]) for name, term in losses.items()]
    reached = [(v, c.to(v.device, v.dtype)) for v, c in reached if v.requires_grad]
    if update.loss_scale != 1:
        reached = [(v, update.loss_scale * c) for v, c in reached]
    if reached:
        torch.autograd.backward([v for v, _ in reached], [c for _, c in reached])
    return bool(reached)


def _check_graph(told: list[Swept]) -> None:
    """Refuse a batch of which no loss depends on a parameter, as `loss.backward()` would."""
    passes = [swept.has_graph for swept in told if swept.has_graph is not None]
    if passes and not any(passes):
        raise LossError(
            "no loss of the batch depends on a trainable parameter, expected a graph to go back "
            "through. Is the model called under torch.no_grad(), or its output detached?"
        )


class _Draws:
    """Seeds the generators for a grain, or sees to it that nothing is drawn."""

    def __init__(self, update: Update, part: Part) -> None:
        self._device = update.device
        self._states: States | None = None
        if update.key is not None and part.grain is not None:
            seed_generators(update.key.grain(part.grain), update.device)
            return
        is_quiet = draws(update.model, update.survey) is False  # leaves NumPy and `random` alone
        self._states = States.now(update.device, others=not is_quiet)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._states is None or (error is None and not self._states.drawn(self._device)):
            return
        self._states.restore(self._device)
        if error is None:
            raise Drew


def _reduce(update: Update, told: list[Swept]) -> Outcome:
    """Reduce what all ranks hold, in their order."""
    held = [swept for swept in told if swept.losses]
    losses = joined([swept.losses for swept in held])
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


def _ones(term: ExampleLosses) -> Tensor:
    """[B], 1 for the examples that take part: a linear reduction has one value an example."""
    if term.counts is None:
        return torch.ones_like(term.values)
    return term.present.to(term.values.dtype)


def _total_count(term: ExampleLosses) -> float:
    return len(term.values) if term.counts is None else term.counts.double().sum().item()
