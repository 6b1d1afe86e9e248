"""Gradient of one update from a share of its batch.

    G = sum_i c_i grad v_i(w) + grad Omega(w),    c_i = dR/dv_i over the whole batch

Micro-batches, passes and ranks change the order of the sum alone.
"""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import BatchError, LayoutError, ModelError
from anybatch.gradient import auto_micro_batch, fsdp, self_check
from anybatch.gradient.arguments import check_arguments, to_ids
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.data_term import sum_data_term
from anybatch.gradient.grad_scaler import note_unscaled, read_scale
from anybatch.gradient.observed import ObservedUpdate
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.passes import Accumulator, Cut
from anybatch.gradient.result import Gradient, complete_sum, make_gradient
from anybatch.gradient.survey import Facts, NewFact, Survey, survey_update
from anybatch.gradient.tree_accumulator import TreeAccumulator
from anybatch.gradient.update import GrainNorms, Update, Writes
from anybatch.kernels.choice import choices, get_way, use_torch_kernels
from anybatch.layout import (
    Layout,
    MicroBatch,
    ShareRange,
    cut_grains,
    cut_micro_batches,
    cut_pieces,
    list_grain_ranges,
)
from anybatch.ledger.gradient_taps import SecondDerivative
from anybatch.ledger.ledger import Observe
from anybatch.ledger.unplaced import UnplacedError
from anybatch.objective import Objective
from anybatch.precision import Precision
from anybatch.pytree import MicroBatches, count_examples, list_sizes
from anybatch.randomness import Key, preserve_generators

__all__ = ["batch_gradient"]

_UNCUT = Layout()
_NO_CONTEXT = nullcontext()


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
        objective: example losses, reduction and penalty.
        share: this rank's examples: a pytree whose leaves have the examples first, or
            `MicroBatches` of these; may be empty.
        key: origin of the model's random numbers; a model that draws needs it.
        layout: how the share is cut into micro-batches; None: all at once.
        observe: which per-example quantities `gradient.ledger` is to hold.
        clip: `ClipNorm(max_norm)` of the whole gradient, or `ClipExamples(max_norm)` of each
            example's.
        ids: [B] of integers, the examples' ids, for errors and records.
        reduction_state: `gradient.reduction_state` of the last update, for reductions with state.
        group: the ranks that hold the other shares; None: this process alone.
        precision: "bfloat16" or "float16": by autocast, in every forward pass.
        loss_scale: factor of the coefficients in the backward pass, and divisor of the gradients
            afterwards, so that small ones do not vanish in float16; a power of two is exact.
        scaler: the caller's `torch.amp.GradScaler`, whose `step` follows. Gradients
            are left multiplied by its scale, as `scaler.scale(loss).backward()` would leave them;
            losses, norms and the ledger are not. None: `optimizer.step()` follows.
        bitwise: grain by grain, by torch's own kernels, and added up in a fixed order: the same
            bits for every layout of whole grains and every number of ranks with as many threads
            each.
        self_check: at the 1st, 10th, 100th, ... update in which the batch is cut, compare the
            gradient of a few examples with plain autograd; see `self_check`. "run": if the batch
            is not cut, refuse state in Python attributes that no checkpoint holds.

    Returns:
        Loss, parts, losses and coefficients of the update.

    Raises:
        LossError, BatchError, LayoutError, ModelError: the update cannot be computed as declared;
            raised on every rank. DivergenceError: a loss that is not finite. Buffers are then
            unchanged, and no part of a gradient is left in `.grad`.

    Example:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> def example_losses(model, batch):
        ...     inputs, targets = batch
        ...     return mse_loss(model(inputs)[:, 0], targets, reduction="none")
        >>> model, batch = nn.Linear(3, 1), (torch.ones(8, 3), torch.zeros(8))
        >>> gradient = batch_gradient(
        ...     model, Objective(example_losses), batch, layout=Layout(micro_batch=2)
        ... )
        >>> model.weight.grad.shape, gradient.num_examples
        (torch.Size([1, 3]), 8)
    """
    survey, facts = _survey(model, objective, group)
    ids = None if ids is None else to_ids(ids)
    update = Update(
        model=model,
        survey=survey,
        facts=facts,
        device=next(iter(survey.parameters.values())).device,
        objective=objective,
        share=share,
        share_range=_find_share_range(share, ids, key, group),
        key=key,
        ids=ids,
        reduction_states=reduction_state or {},
        group=group,
        writes=Writes(survey.parameters, share),
        precision=precision,
        loss_scale=loss_scale if scaler is None else read_scale(scaler, loss_scale, model),
        scaler=scaler,
        is_bitwise=bitwise,
        self_check=self_check,
    )
    return _compute(update, observe, clip, layout or _UNCUT)


def _survey(
    model: nn.Module, objective: Objective, group: ProcessGroup | None
) -> tuple[Survey, Facts]:
    survey, facts = survey_update(model, objective.example_losses)
    if survey.units:
        return fsdp.survey_shards(model, objective.example_losses, survey, group)
    return survey, facts


def _compute(
    update: Update, observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> Gradient:
    update.has_kernels = (choices.way or get_way()) != "torch"
    if update.facts.changed_parameters:
        update.writes.allow(update.facts.changed_parameters)
    if update.survey.units:
        fsdp.check_options(observe, clip, layout)
    if update.share_range.pieces is not None:
        sizes = list_sizes(update.share)
        layout = layout if sizes is None else cut_pieces(layout, sizes)
    if layout.micro_batch == "auto":
        compute = partial(_compute_layout, update, observe, clip)
        return auto_micro_batch.compute_with_most(update, layout, compute)
    return _compute_layout(update, observe, clip, layout)


def _find_share_range(
    share: Any, ids: Tensor | None, key: Key | None, group: ProcessGroup | None
) -> ShareRange:
    """Count the examples of all shares, and find where this one lies in the batch."""
    pieces = share.sizes if isinstance(share, MicroBatches) else None
    if group is None:
        rank, sizes = 0, [_count_examples(share, ids)]
    else:
        per_rank = distributed.all_gather_object(
            lambda: (_count_examples(share, ids), key, list_sizes(share)), group
        )
        rank, sizes = distributed.get_rank(group), [size for size, _, _ in per_rank]
        keys = [rank_key for _, rank_key, _ in per_rank]
        if any(cut is not None for *_, cut in per_rank):
            cuts_of_ranks = [(size,) if cut is None else cut for size, _, cut in per_rank]
            pieces = tuple(piece for cut in cuts_of_ranks for piece in cut)
        if any(other != keys[0] for other in keys):
            raise ModelError(
                f"The ranks have the keys {keys}. All must have the same key: random numbers "
                f"depend on the key and the grain, and no two ranks have the same grain. Do not "
                f"add the rank to the seed."
            )
    cuts = (0, *accumulate(sizes))
    if cuts[-1] == 0:
        raise BatchError("The batch is empty. An update needs at least one example.")
    return ShareRange(cuts[rank], cuts[rank + 1], cuts[-1], cuts, pieces)


def _count_examples(share: Any, ids: Tensor | None) -> int:
    num_examples = count_examples(share)
    if ids is not None and ids.shape != (num_examples,):
        raise BatchError(
            f"ids have shape {tuple(ids.shape)}, and there are {num_examples} examples. Pass one "
            f"id per example."
        )
    return num_examples


def _compute_layout(
    update: Update, observe: Observe | None, clip: ClipNorm | ClipExamples | None, layout: Layout
) -> Gradient:
    """Attempt the update until an attempt shows no new fact about the model."""
    problem = None
    if layout.micro_batch or update.objective.grain or update.group or update.self_check == "run":
        problem = _check_layouts(update, layout)
    observed: ObservedUpdate | None = None
    clip_examples = clip if isinstance(clip, ClipExamples) else None
    with use_torch_kernels() if update.is_bitwise else _NO_CONTEXT:
        while True:
            update.grain_norms, update.observation, observed = None, None, None
            try:
                if observe is not None and observe.grain_norms:
                    update.grain_norms = GrainNorms(update.survey)
                if clip_examples or (observe is not None and observe.is_per_example):
                    options = observe or Observe(norms=False)
                    make = partial(ObservedUpdate, update, options, clip_examples)
                    observed = distributed.call_together(make, update.group)
                    update.observation = observed
                return _attempt(update, layout, clip, problem)
            except NewFact as fact:
                update.writes.check_repeatable()
                if fact.name == "draws" and update.key is None:
                    raise ModelError(
                        "The model draws random numbers (dropout?), and no key says where they "
                        "come from. Pass key=ab.Key(seed, step), so that every layout draws the "
                        "same."
                    ) from None
                setattr(update.facts, fact.name, True)
            except SecondDerivative:  # the next attempt provides for it
                if update.group is not None:  # other ranks would not repeat the attempt
                    raise
                update.writes.check_repeatable()
            except UnplacedError as error:
                if observed is None:  # this model's examples cannot be separated in any way
                    raise
                update.writes.check_repeatable()
                distributed.call_together(partial(observed.replan, error), update.group)
            finally:
                update.observation = None  # each holds the other, and so the tensors of all passes


def _check_layouts(update: Update, layout: Layout) -> Exception | None:
    """Run the self-check, if the batch is cut and a check is due; see `check_layouts`."""
    is_cut = update.group is not None
    micro_batches: list[MicroBatch] = []
    if layout.micro_batch is not None or update.objective.grain is not None:
        with suppress(LayoutError):  # the passes raise it, on every rank
            micro_batches = _cut_share(update, layout, update.find_grain_reason())
        is_cut = is_cut or len(micro_batches) > 1
    if not self_check.is_due(update, is_cut=is_cut):
        return None
    if not micro_batches:
        with suppress(LayoutError):
            micro_batches = _cut_share(update, layout, update.find_grain_reason())
    check = partial(self_check.check_layouts, update, micro_batches, is_cut=is_cut)
    is_confirmed = False
    try:
        problem = distributed.call_together(check, update.group)
        is_confirmed = problem is None
    finally:
        if not is_confirmed:
            self_check.postpone(update, is_cut=is_cut)
    update.writes.allow(update.facts.changed_parameters)
    return problem


def _cut_share(update: Update, layout: Layout, reason: str | None) -> list[MicroBatch]:
    """Cut a share into grains for a reason; into the layout's micro-batches if there is none."""
    if reason is not None:
        return cut_grains(update.share_range, update.objective.grain, layout, reason)
    size = update.share_range.stop - update.share_range.start
    if layout.micro_batch is None:
        return [MicroBatch(0, size)] if size else []
    return cut_micro_batches(layout, size)


def _cut_once(update: Update, layout: Layout, reason: str | None) -> Cut:
    """Cut the share. With a group, each call raises the error, if any: see `sum_data_term`."""
    if update.group is not None:
        return cache(partial(_cut_share, update, layout, reason))
    return _cut_share(update, layout, reason).copy  # a copy for each call


def _attempt(
    update: Update,
    layout: Layout,
    clip: ClipNorm | ClipExamples | None,
    problem: Exception | None,
) -> Gradient:
    """Compute the update, and leave its gradient in `.grad`.

    Args:
        problem: an error that prevented the self-check; raised if there is no other.
    """
    survey, facts, group = update.survey, update.facts, update.group
    reason = update.find_grain_reason()
    cut = _cut_once(update, layout, reason)
    is_seeded = update.key is not None and reason is not None
    update, buffers, accumulator = _prepare(update, cut)
    try:
        with preserve_generators(update.device) if is_seeded else _NO_CONTEXT:
            outcome = sum_data_term(update, cut, buffers, accumulator)
        with _NO_CONTEXT if group is None else distributed.raise_together(group):
            if problem is not None:
                raise self_check.explain(problem) from problem
            completion = complete_sum(update, outcome, accumulator, clip)
        noise = None if update.observation is None else update.observation.noise()
        if noise is not None and completion.ledger is not None:
            completion = completion._replace(ledger=replace(completion.ledger, noise=noise))
        if buffers is not None and completion.is_finite:
            buffers.commit(group)
        elif buffers is not None:
            buffers.restore()
    except BaseException:  # leave neither a partial gradient nor changed buffers
        if buffers is not None:
            buffers.restore()
        accumulator.clear()
        raise
    accumulator.deliver()
    if update.scaler is None:
        note_unscaled(update.model, survey.parameters.values())
    if update.hooks is not None:
        update.hooks.finish()
    if facts.draws is None and not is_seeded and cut():
        facts.draws = False
    return make_gradient(update, outcome, completion, cut())


def _prepare(update: Update, cut: Cut) -> tuple[Update, Buffers | None, Accumulator]:
    """Plan dummy passes or collect hooks; create what collects buffers and gradients."""
    survey, group, ranges = update.survey, update.group, None
    update.outputs.clear()
    for p in survey.frozen:
        p.grad = None
    if update.is_bitwise:
        ranges = list_grain_ranges(update.share_range, update.objective.grain)
    buffers = Buffers(survey.buffers, ranges) if survey.buffers else None
    if survey.units and group is not None:
        num_passes = distributed.all_gather_object(lambda: len(cut()), group)
        update = replace(update, padding=fsdp.plan_padding(update, num_passes))
        sharded = fsdp.ShardedAccumulator(survey, num_passes, ranges, group)
        return update, buffers, sharded
    if survey.hooked:
        update = replace(update, hooks=ParameterHooks(survey.hooked))
    if ranges is None:
        is_separate = update.grain_norms is not None
        accumulator = Accumulator(survey.parameters, group, is_separate=is_separate)
        return update, buffers, accumulator
    is_plain = update.observation is None and update.grain_norms is None
    is_early = is_plain and not update.facts.comes_in_portions
    tree = TreeAccumulator(survey.parameters, ranges, group, is_early=is_early)
    return update, buffers, tree
