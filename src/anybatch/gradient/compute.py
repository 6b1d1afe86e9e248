"""The gradient of one update from a share of its batch.

    G = sum_i c_i grad v_i(w) + grad Omega(w),    c_i = dR/dv_i over the whole batch

The parts of a share, the passes over them and the ranks change the order of the sum alone.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch import batch as batches
from anybatch import distributed, penalties
from anybatch.distributed import ProcessGroup, shards
from anybatch.errors import BatchError, ModelError
from anybatch.gradient import fit, habits, sharded
from anybatch.gradient.accumulate import Accumulator, TreeAccumulator
from anybatch.gradient.buckets import InPortions, in_portions
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.grain_norms import GrainNorms
from anybatch.gradient.passes import Cut, Drew, Outcome, run
from anybatch.gradient.result import Gradient, mean_metrics
from anybatch.gradient.sharded import ShardedAccumulator
from anybatch.gradient.update import Update
from anybatch.gradient.watch import Watch
from anybatch.layout import Layout, Part, Place, grains, micro_batches, runs
from anybatch.ledger import kernels
from anybatch.ledger.quantities import Ledger, Observe
from anybatch.ledger.taps import SecondDerivative
from anybatch.ledger.unplaced import UnplacedError
from anybatch.objective import Objective
from anybatch.precision import Precision, check_precision
from anybatch.randomness import Key, generators_restored

__all__ = ["batch_gradient"]


def batch_gradient(
    model: nn.Module,
    objective: Objective,
    share: Any,
    *,
    key: Key | None = None,
    layout: Layout | None = None,
    observe: Observe | None = None,
    clip: ClipNorm | ClipExamples | None = None,
    ids: Tensor | None = None,
    reduction_state: Mapping[str, Tensor | None] | None = None,
    group: ProcessGroup | None = None,
    precision: Precision = "float32",
    loss_scale: float = 1.0,
    bitwise: bool = False,
) -> Gradient:
    """Leave the gradient of the batch's objective in each parameter's `.grad`.

    Like `loss.backward()`, but it replaces what is there, and every trainable parameter gets a
    gradient, zeros if nothing reached it. Exact for every layout up to the order of summation.
    Buffers take one update; the global random generators are left as they were.

    Args:
        model: the bare module, its parameters on one device.
        objective: what to minimise.
        share: this rank's examples: a pytree whose leaves have the examples first; may be empty.
        key: where the model's random numbers come from; needed by a model that draws.
        layout: how the share is cut into micro-batches; None: all at once.
        observe: which per-example quantities `gradient.ledger` is to hold.
        clip: `ClipNorm(max_norm)` of the whole gradient, or `ClipExamples(max_norm)` of each
            example's.
        ids: [B] of integers, the examples' ids, for errors and records.
        reduction_state: `gradient.reduction_state` of the last update, for reductions with state.
        group: the ranks that hold the other shares; None: this process alone.
        precision: "bfloat16" or "float16": by autocast, in every forward pass.
        loss_scale: what coefficients are multiplied by on the way back and gradients divided by
            afterwards, so that small ones do not vanish in float16; a power of two is exact.
        bitwise: grain by grain, by torch's own kernels, and added up in a fixed order: the same
            bits for every layout of whole grains and every number of ranks with as many threads
            each.

    Returns:
        Loss, parts, losses and coefficients of the update.

    Raises:
        LossError, BatchError, LayoutError, ModelError: what cannot be computed as declared, on
            every rank; DivergenceError: a loss that is not finite. Buffers are then unchanged,
            and no part of a gradient is left in `.grad`.
    """
    layout = layout or Layout()
    check_precision(precision)
    ids = None if ids is None else torch.as_tensor(ids, device="cpu")
    survey = sharded.surveyed(model, group)
    if survey.units:
        sharded.check_asked(observe, clip, layout)
    update = Update(
        model=model,
        survey=survey,
        objective=objective,
        share=share,
        place=_place(share, ids, key, group),
        key=key,
        ids=ids,
        states=reduction_state or {},
        device=next(iter(survey.parameters.values())).device,
        group=group,
        precision=precision,
        loss_scale=loss_scale,
        is_bitwise=bitwise,
    )
    if layout.micro_batch == "auto":
        return fit.as_much_as_fits(update, layout, partial(_compute, update, observe, clip))
    return _compute(update, observe, clip, layout)


def _compute(
    update: Update, observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> Gradient:
    whole = clip if isinstance(clip, ClipNorm) else None
    each = clip if isinstance(clip, ClipExamples) else None
    observe = observe or Observe(norms=False)

    watch: Watch | None = None

    def attempt() -> Gradient:
        nonlocal watch
        own, watch = update, None
        if observe.grain_norms:
            own = replace(own, grain_norms=GrainNorms(update.survey))
        if observe.is_per_example or each is not None:
            watch = distributed.agreed(lambda: Watch(update, observe, each), update.group)
            own = replace(own, watch=watch)
        return _attempt(own, cache(partial(_parts, own, layout)), whole)

    with kernels.default_alone() if update.is_bitwise else nullcontext():
        while True:
            try:
                return attempt()
            except Drew:
                _accept_draws(update)
            except InPortions:
                in_portions.add(update.model)
            except SecondDerivative:  # met for the first time; the next attempt provides for it
                if update.group is not None:  # other ranks would not come along
                    raise
            except UnplacedError as error:
                if watch is None:  # there is no way at all to take the model's examples apart
                    raise
                distributed.agreed(partial(watch.replan, error), update.group)


def _attempt(update: Update, cut: Cut, clip: ClipNorm | None) -> Gradient:
    model, survey = update.model, update.survey
    seeds = update.key is not None and update.why_grains() is not None
    passes: list[int] = []
    if survey.units:
        passes = distributed.everywhere(lambda: len(cut()), update.group)
        update = replace(update, idle=sharded.idle(update, passes))
    buffers, accumulator = _collectors(update, passes)
    try:
        with generators_restored(update.device) if seeds else nullcontext():
            outcome = run(update, cut, buffers, accumulator)
        with distributed.by_itself(update.group):
            done = _completed(update, outcome, accumulator, clip)
        if done.ledger is not None and update.watch is not None:
            done = done._replace(ledger=replace(done.ledger, noise=update.watch.noise()))
        if done.is_finite:
            buffers.commit(update.group)
        else:
            buffers.restore()
    except BaseException:  # neither half a gradient nor moved buffers are left behind
        buffers.restore()
        accumulator.clear()
        raise
    accumulator.deliver()
    parts = cut()
    if parts and not seeds and habits.draws(model, survey) is None:
        habits.remember(model, survey, draws=False)
    micro_batch = max((part.stop - part.start for part in parts), default=0)
    return _gradient(update, outcome, done, micro_batch)


def _collectors(update: Update, passes: list[int]) -> tuple[Buffers, Accumulator]:
    """What takes in the buffers and gradients of the parts."""
    survey, grains_of = update.survey, None
    if update.is_bitwise:
        grains_of = runs(update.place, update.objective.grain)
    buffers = Buffers(survey.buffers, grains_of)
    if survey.units and update.group is not None:
        return buffers, ShardedAccumulator(survey, passes, grains_of, update.group)
    if grains_of is None:
        return buffers, Accumulator(survey.parameters, update.group)
    is_delivered = update.watch is not None or update.grain_norms is not None
    is_early = not is_delivered and update.model not in in_portions
    return buffers, TreeAccumulator(survey.parameters, grains_of, update.group, is_early=is_early)


class _Completed(NamedTuple):
    """What a rank makes of the sums for itself: the same on all, but for its share's ledger."""

    parts: dict[str, Tensor]
    is_finite: bool
    ledger: Ledger | None
    norm: Tensor | None


def _completed(
    update: Update, outcome: Outcome, accumulator: Accumulator, clip: ClipNorm | None
) -> _Completed:
    """Undo the loss scale, add the penalty, and clip, in place."""
    sums = list(accumulator.sums.values())
    is_finite = _unscaled(sums, update)
    ledger = _ledger(update, accumulator, outcome)
    parts = {name: r.value for name, r in outcome.reduced.items()}
    penalty = update.objective.penalty
    parts |= penalties.add_gradients(penalty, update.model, accumulator.sums, whole=shards.whole)
    return _Completed(parts, is_finite, ledger, None if clip is None else clip.apply(sums))


def _ledger(update: Update, accumulator: Accumulator, outcome: Outcome) -> Ledger | None:
    found = None
    if update.watch is not None:
        found = update.watch.ledger(accumulator.sums, outcome.factor)
    if update.grain_norms is not None:
        why = update.why_grains()
        norms = update.grain_norms.norms(why, outcome.factor / update.loss_scale)
        found = replace(found or Ledger(), grain_norms=norms)
    return found


def _unscaled(gradients: list[Tensor], update: Update) -> bool:
    """Divide by the loss scale, in place; returns whether every element is finite, which is the
    same on every rank, since the sums are."""
    not_finite = torch.zeros((), device=update.device)
    factor = torch.full((), 1 / update.loss_scale, device=update.device)
    real = [_as_real(g) for g in gradients]
    torch._amp_foreach_non_finite_check_and_unscale_(real, not_finite, factor)
    return not not_finite.item()


def _as_real(gradient: Tensor) -> Tensor:
    """The same memory as real numbers; of a conjugate, that of its conjugate."""
    if not gradient.is_complex():
        return gradient
    return torch.view_as_real(gradient.conj() if gradient.is_conj() else gradient)


def _accept_draws(update: Update) -> None:
    """Note that the model has been caught drawing random numbers, if a key says from where."""
    if update.key is None:
        raise ModelError(
            "the model draws random numbers (dropout?), expected key=ab.Key(seed, step) to say "
            "where they come from, so that every layout draws the same."
        )
    habits.remember(update.model, update.survey, draws=True)


def _parts(update: Update, layout: Layout) -> list[Part]:
    why = update.why_grains()
    if why is not None:
        return grains(update.place, update.objective.grain, layout, why)
    return micro_batches(layout, update.place.stop - update.place.start)


def _place(share: Any, ids: Tensor | None, key: Key | None, group: ProcessGroup | None) -> Place:
    def count() -> tuple[int, Key | None]:
        num_examples = batches.size(share)
        if ids is not None and ids.shape != (num_examples,):
            raise BatchError(
                f"expected one id an example, got ids of shape {tuple(ids.shape)} for "
                f"{num_examples} examples."
            )
        return num_examples, key

    if group is None:
        num_examples, _ = count()
        if num_examples == 0:
            raise BatchError("expected at least one example in the batch, got none.")
        return Place(0, num_examples, num_examples)
    told = distributed.everywhere(count, group)
    sizes, keys = [size for size, _ in told], [key for _, key in told]
    if any(other != keys[0] for other in keys):
        raise ModelError(
            f"the ranks have the keys {keys}, expected one for all: random numbers follow from "
            f"it and the grain, which no other rank has. Do not add the rank to the seed."
        )
    rank = distributed.rank_of(group)
    if sum(sizes) == 0:
        raise BatchError("expected at least one example in the batch, got none.")
    cuts = (0, *accumulate(sizes))
    return Place(cuts[rank], cuts[rank + 1], cuts[-1], cuts)


def _gradient(
    update: Update,
    outcome: Outcome,
    done: _Completed,
    micro_batch: int,
) -> Gradient:
    start, stop, total, _ = update.place
    values = [part.to(update.device) for part in done.parts.values()]
    terms = outcome.losses
    if not update.place.is_whole:
        terms = {name: term.map(lambda t: t[start:stop]) for name, term in terms.items()}
    return Gradient(
        loss=values[0] if len(values) == 1 else torch.stack(values).sum(),
        parts=done.parts,
        terms=terms,
        term_coefficients=outcome.coefficients(start, stop),
        metrics=mean_metrics(outcome.losses),
        num_examples=total,
        ids=update.ids,
        norm=done.norm,
        is_finite=done.is_finite,
        micro_batch=micro_batch,
        reduction_state={name: r.state for name, r in outcome.reduced.items()},
        group=update.group,
        ledger=done.ledger,
    )
