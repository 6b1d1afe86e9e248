"""The gradient of one update from a share of its batch.

    G = sum_i c_i grad v_i(w) + grad Omega(w),    c_i = dR/dv_i over the whole batch

The parts of a share, the passes over them and the ranks change the order of the sum alone.
"""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from anybatch import distributed, pytree
from anybatch.distributed import ProcessGroup
from anybatch.errors import BatchError, LayoutError, ModelError
from anybatch.example_losses import sum_metrics
from anybatch.gradient import auto_micro_batch, fsdp, self_check
from anybatch.gradient.accumulate import Accumulator, TreeAccumulator
from anybatch.gradient.arguments import as_ids, check_arguments
from anybatch.gradient.attempts import Again, Drew, InPortions
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.completion import Completed, complete
from anybatch.gradient.forward_writes import Writes
from anybatch.gradient.fsdp import ShardedAccumulator
from anybatch.gradient.grad_scaler import note_unscaled, scale_of
from anybatch.gradient.grain_norms import GrainNorms
from anybatch.gradient.observed import Watch
from anybatch.gradient.parameter_hooks import hooks_of
from anybatch.gradient.passes import Cut, Outcome, run
from anybatch.gradient.result import Gradient
from anybatch.gradient.survey import Facts, Survey, add_outside_modules, get_facts
from anybatch.gradient.update import Update
from anybatch.kernels.choice import use_torch_kernels
from anybatch.layout import (
    Layout,
    MicroBatch,
    ShareRange,
    cut_grains,
    cut_micro_batches,
    list_grain_ranges,
)
from anybatch.ledger.gradient_taps import SecondDerivative
from anybatch.ledger.ledger import Observe
from anybatch.ledger.unplaced import UnplacedError
from anybatch.objective import Objective
from anybatch.precision import Precision, check_precision
from anybatch.randomness import Key, preserve_generators

__all__ = ["batch_gradient"]

_NOTHING = Observe(norms=False)


@check_arguments
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
    scaler: GradScaler | None = None,
    bitwise: bool = False,
    self_check: bool | Literal["run"] = True,
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
        scaler: the `torch.amp.GradScaler` of a loop of one's own, whose `step` follows. Gradients
            are left multiplied by its scale, as `scaler.scale(loss).backward()` would leave them;
            losses, norms and the ledger are not. None: `optimizer.step()` follows.
        bitwise: grain by grain, by torch's own kernels, and added up in a fixed order: the same
            bits for every layout of whole grains and every number of ranks with as many threads
            each.
        self_check: at the 1st, 10th, 100th, ... update in which the batch is cut, compare the
            gradient of a few examples with plain autograd; see `self_check`. "run": refuse also, of
            a batch that is not cut, state in Python attributes that no checkpoint holds.

    Returns:
        Loss, parts, losses and coefficients of the update.

    Raises:
        LossError, BatchError, LayoutError, ModelError: what cannot be computed as declared, on
            every rank; DivergenceError: a loss that is not finite. Buffers are then unchanged,
            and no part of a gradient is left in `.grad`.
    """
    check_precision(precision)
    ids = as_ids(ids)
    survey, facts = _survey(model, objective, group)
    update = Update(
        model=model,
        survey=survey,
        facts=facts,
        objective=objective,
        share=share,
        place=_place(share, ids, key, group),
        key=key,
        ids=ids,
        states=reduction_state or {},
        group=group,
        writes=Writes(survey.parameters, share, allowed=facts.written),
        precision=precision,
        loss_scale=scale_of(scaler, loss_scale, model),
        scaler=scaler,
        is_bitwise=bitwise,
        self_check=self_check,
    )
    return _compute(update, observe, clip, layout or Layout())


def _survey(
    model: nn.Module, objective: Objective, group: ProcessGroup | None
) -> tuple[Survey, Facts]:
    """Collect what is known of the model and of the modules that the losses use beside it."""
    survey = fsdp.surveyed(model, group)
    facts = get_facts(model, objective.example_losses, survey.mode)
    return (add_outside_modules(survey, facts) if facts.outside else survey), facts


def _compute(
    update: Update, observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> Gradient:
    if update.survey.units:
        fsdp.check_asked(observe, clip, layout)
    compute = partial(_compute_cut, update, observe, clip)
    if layout.micro_batch == "auto":
        return auto_micro_batch.as_much_as_fits(update, layout, compute)
    return compute(layout)


def _compute_cut(
    update: Update, observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> Gradient:
    whole = clip if isinstance(clip, ClipNorm) else None
    each = clip if isinstance(clip, ClipExamples) else None
    observe = observe or _NOTHING

    watch: Watch | None = None

    def attempt() -> Gradient:
        nonlocal watch
        own, watch = update, None
        if observe.grain_norms:
            own = replace(own, grain_norms=GrainNorms(update.survey))
        if observe.is_per_example or each is not None:
            watch = distributed.call_together(lambda: Watch(update, observe, each), update.group)
            own = replace(own, watch=watch)
        return _attempt(own, cache(partial(_parts, own, layout)), whole, problem)

    problem = _check_layouts(update, layout)
    with use_torch_kernels() if update.is_bitwise else nullcontext():
        while True:
            try:
                return attempt()
            except Again as again:
                _prepare_next_attempt(update, again)
            except SecondDerivative:  # met for the first time; the next attempt provides for it
                if update.group is not None:  # other ranks would not come along
                    raise
                update.writes.check_repeatable()
            except UnplacedError as error:
                if watch is None:  # there is no way at all to take the model's examples apart
                    raise
                update.writes.check_repeatable()
                distributed.call_together(partial(watch.replan, error), update.group)


def _check_layouts(update: Update, layout: Layout) -> Exception | None:
    """Check the promise on a few examples, where the batch is cut and it is time to."""
    parts: list[MicroBatch] = []
    is_cut = update.group is not None
    if layout.micro_batch is not None or update.objective.grain is not None:
        with suppress(LayoutError):  # the passes will say so, on every rank
            parts = _parts(update, layout)
        is_cut = is_cut or len(parts) > 1
    elif not is_cut and update.self_check != "run":
        return None
    if not self_check.is_due(update, is_cut=is_cut):
        return None
    if not parts:
        with suppress(LayoutError):
            parts = _parts(update, layout)
    check = partial(self_check.check_layouts, update, parts, is_cut=is_cut)
    is_confirmed = False
    try:
        problem = distributed.call_together(check, update.group)
        is_confirmed = problem is None
    finally:
        if not is_confirmed:
            self_check.check_next(update, is_cut=is_cut)
    update.writes.allow(update.facts.written)
    return problem


def _attempt(
    update: Update, cut: Cut, clip: ClipNorm | None, problem: Exception | None
) -> Gradient:
    """Make the update.

    Args:
        problem: an error that kept `self_check` from its work; raised if there is no other.
    """
    survey = update.survey
    seeds = update.key is not None and update.find_grain_reason() is not None
    passes: list[int] = []
    if survey.units:
        passes = distributed.all_gather_object(lambda: len(cut()), update.group)
        update = replace(update, idle=fsdp.idle(update, passes))
    elif (hooks := hooks_of(survey.parameters)) is not None:
        update = replace(update, hooks=hooks)
    buffers, accumulator = _collectors(update, passes)
    for p in survey.frozen:
        p.grad = None
    try:
        with preserve_generators(update.device) if seeds else nullcontext():
            outcome = run(update, cut, buffers, accumulator)
        with distributed.raise_together(update.group):
            if problem is not None:
                raise self_check.explain(problem) from problem
            done = complete(update, outcome, accumulator, clip)
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
    if update.scaler is None:
        note_unscaled(update.model, survey.parameters.values())
    if update.hooks is not None:
        update.hooks.finish()
    parts = cut()
    if parts and not seeds and update.facts.draws is None:
        update.facts.draws = False
    return _gradient(update, outcome, done, parts)


def _prepare_next_attempt(update: Update, again: Again) -> None:
    """Note what an attempt has shown, so that the next one takes account of it.

    Raises:
        ModelError: the batch has been changed by the attempt, or draws have no key.
    """
    update.writes.check_repeatable()
    if isinstance(again, Drew):
        _accept_draws(update)
    elif isinstance(again, InPortions):
        update.facts.comes_in_portions = True
    else:
        update.facts.needs_graph = True


def _collectors(update: Update, passes: list[int]) -> tuple[Buffers, Accumulator]:
    """What takes in the buffers and gradients of the parts."""
    survey, grains_of = update.survey, None
    if update.is_bitwise:
        grains_of = list_grain_ranges(update.place, update.objective.grain)
    buffers = Buffers(survey.buffers, grains_of)
    if survey.units and update.group is not None:
        return buffers, ShardedAccumulator(survey, passes, grains_of, update.group)
    if grains_of is None:
        is_apart = update.grain_norms is not None
        return buffers, Accumulator(survey.parameters, update.group, is_apart=is_apart)
    is_delivered = update.watch is not None or update.grain_norms is not None
    is_early = not (is_delivered or update.facts.comes_in_portions)
    return buffers, TreeAccumulator(survey.parameters, grains_of, update.group, is_early=is_early)


def _accept_draws(update: Update) -> None:
    """Note that the model has been caught drawing random numbers, if a key says from where."""
    if update.key is None:
        raise ModelError(
            "the model draws random numbers (dropout?), expected key=ab.Key(seed, step) to say "
            "where they come from, so that every layout draws the same."
        )
    update.facts.draws = True


def _parts(update: Update, layout: Layout) -> list[MicroBatch]:
    why = update.find_grain_reason()
    if why is not None:
        return cut_grains(update.place, update.objective.grain, layout, why)
    return cut_micro_batches(layout, update.place.stop - update.place.start)


def _place(
    share: Any, ids: Tensor | None, key: Key | None, group: ProcessGroup | None
) -> ShareRange:
    def count() -> tuple[int, Key | None]:
        num_examples = pytree.count_examples(share)
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
        return ShareRange(0, num_examples, num_examples)
    told = distributed.all_gather_object(count, group)
    sizes, keys = [size for size, _ in told], [key for _, key in told]
    if any(other != keys[0] for other in keys):
        raise ModelError(
            f"the ranks have the keys {keys}, expected one for all: random numbers follow from "
            f"it and the grain, which no other rank has. Do not add the rank to the seed."
        )
    rank = distributed.get_rank(group)
    if sum(sizes) == 0:
        raise BatchError("expected at least one example in the batch, got none.")
    cuts = (0, *accumulate(sizes))
    return ShareRange(cuts[rank], cuts[rank + 1], cuts[-1], cuts)


def _gradient(
    update: Update,
    outcome: Outcome,
    done: Completed,
    parts: list[MicroBatch],
) -> Gradient:
    start, stop, total, _ = update.place
    values = [part.to(update.device) for part in done.parts.values()]
    terms = outcome.losses
    if update.place.size < update.place.total:
        terms = {name: term.map(lambda t: t[start:stop]) for name, term in terms.items()}
    return Gradient(
        loss=values[0] if len(values) == 1 else torch.stack(values).sum(),
        parts=done.parts,
        terms=terms,
        term_coefficients=outcome.coefficients(start, stop),
        metrics=sum_metrics(outcome.losses),
        num_examples=total,
        ids=update.ids,
        norm=done.norm,
        is_finite=done.is_finite,
        micro_batch=max((part.stop - part.start for part in parts), default=0),
        reduction_state={name: r.state for name, r in outcome.reduced.items()},
        group=update.group,
        ledger=done.ledger,
    )
