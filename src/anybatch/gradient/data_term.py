"""Gradient of the data term: forward, reduce, backward, and sum over micro-batches and ranks.

    G = sum_i c_i grad v_i,    c_i = dR/dv_i over the whole batch

The coefficients c are needed before a backward pass. How they come to be known depends on the
batch and on R:

    uncut       forward, R, backward with c
    linear R    forward and backward for each micro-batch, with a seed s; c/s multiplies the sum
    any other   forward for all without a graph, R; then forward and backward with c, of those
                examples whose c is not 0

If R is linear and there are no counts, c is known beforehand and s = c. With counts n_i,

    s = 2^round(log2(1 / (B * mean n of the micro-batch))),    G = c * sum_m G_m / s

over the micro-batches m.

Multiplying by powers of two changes no bit. Gradients keep the size that they have uncut, so half
precision overflows, and hooks on activations see, what they would in an uncut batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from anybatch import distributed
from anybatch._torch import multiply_in_place
from anybatch.distributed import fsdp
from anybatch.errors import LossError, ModelError
from anybatch.example_losses import ExampleLosses, Losses, concatenate_losses
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.passes import Accumulator, Cut, Sweep, Weights, sweep
from anybatch.gradient.survey import NewFact
from anybatch.gradient.update import Outcome, Update
from anybatch.layout import MicroBatch, ShareRange
from anybatch.objective import check_finite
from anybatch.pytree import can_select, select_examples
from anybatch.reduction import Reduction

__all__ = ["sum_data_term"]


def sum_data_term(
    update: Update, cut: Cut, buffers: Buffers | None, accumulator: Accumulator
) -> Outcome:
    """Leave the gradient of the data term, summed over all ranks, in the accumulator.

    Args:
        cut: lists the micro-batches of this share. If it raises an error, all ranks raise it.
        buffers: collects the model's buffers; None: it has none.
    """
    run = partial(sweep, update, cut, buffers, accumulator)
    reduction = update.objective.linear_reduction
    is_alone = update.group is None and not update.is_bitwise
    is_uncut = is_alone and len(cut()) == 1
    is_cut = not is_uncut and (reduction is None or update.group is not None or len(cut()) > 1)
    update.writes.is_cut = is_cut
    if is_uncut:
        sweeps = _gather_sweeps(update, partial(run, partial(_weigh_uncut, update)))
    elif reduction is not None:
        sweeps = _gather_sweeps(update, partial(run, partial(_weigh_linear, update, reduction)))
    else:
        outcome = _reduce(update, _gather_sweeps(update, partial(run, None)))
        go_back = partial(_sweep_again, update, cut, outcome, buffers, accumulator)
        sweeps = _gather_sweeps(update, go_back)
    accumulator.sum_over_ranks()
    if not sweeps[0].has_graph:
        _check_graph(sweeps)
    if is_uncut and sweeps[0].outcome is not None:
        outcome = sweeps[0].outcome
    elif reduction is not None:
        outcome = _complete_linear(update, reduction, _reduce(update, sweeps))
    if outcome.factor != 1:
        multiply_in_place(list(accumulator.sums.values()), outcome.factor)
    return outcome


def _weigh_uncut(update: Update, micro_batch: MicroBatch, losses: Losses) -> Weights:
    """Reduce the whole batch at once."""
    outcome = _reduce(update, [Sweep(losses, update.ids, None, None)])
    coefficients = {name: result.coefficients for name, result in outcome.reduced.items()}
    return Weights(coefficients, 1.0, outcome)


def _weigh_linear(
    update: Update, reduction: Reduction, micro_batch: MicroBatch, losses: Losses
) -> Weights:
    """Give every example that counts the same seed."""
    ((name, term),) = losses.items()
    is_common = bool(update.survey.units)  # ranks run through a sharded model in lockstep
    seed = _choose_seed(update, reduction, term, is_common=is_common)
    weights = torch.full_like(term.values, seed)
    if term.counts is None:
        return Weights({name: weights})
    weights = torch.where(term.present, weights, 0)
    return Weights({name: weights}, 1.0 if is_common else 1 / seed)


def _choose_seed(
    update: Update, reduction: Reduction, term: ExampleLosses, *, is_common: bool
) -> float:
    """Choose the weight of a micro-batch's examples in its backward pass.

    Args:
        is_common: whether all micro-batches need the same seed, which no counts may enter.
    """
    total = update.share_range.total
    if term.counts is None:
        factor = reduction.factor(total, total)
        assert factor is not None
        return factor
    mean = 1.0 if is_common else term.counts.double().mean().item() or 1.0
    factor = reduction.factor(total * mean, total)
    assert factor is not None
    if factor == 0 or not math.isfinite(factor):
        return 1.0
    return math.copysign(2.0 ** round(math.log2(abs(factor))), factor)


def _complete_linear(update: Update, reduction: Reduction, outcome: Outcome) -> Outcome:
    """Add the factor c / s, if the seeds were not c itself."""
    (term,) = outcome.losses.values()
    if term.counts is None:
        return outcome
    factor = reduction.factor(term.counts.double().sum().item(), len(term.values))
    assert factor is not None
    if update.survey.units:
        factor /= _choose_seed(update, reduction, term, is_common=True)
    return replace(outcome, factor=factor)


def _sweep_again(
    update: Update, cut: Cut, outcome: Outcome, buffers: Buffers | None, accumulator: Accumulator
) -> Sweep:
    """Run forward and backward with c, of those examples of this share that need it."""
    outcome = outcome.select(slice(update.share_range.start, update.share_range.stop))
    micro_batches, needed = cut(), _mark_needed(update, outcome)
    if _may_select(update) and not needed.all():
        indices = needed.nonzero()[:, 0]
        size, most = len(indices), max(m.size for m in micro_batches)
        micro_batches = [MicroBatch(i, min(i + most, size)) for i in range(0, size, most)]
        share, ids = select_examples(update.share, indices), update.ids
        update = replace(
            update,
            share=share,
            share_range=ShareRange(0, size, size),
            ids=None if ids is None else ids[indices],
        )
        outcome, needed = outcome.select(indices), needed[indices]
    only = {m for m in micro_batches if needed[m.start : m.stop].any()}
    weigh = partial(_weigh_again, update, outcome)
    return sweep(update, lambda: micro_batches, buffers, accumulator, weigh, only=only)


def _mark_needed(update: Update, outcome: Outcome) -> Tensor:
    """Mark the examples that need a second pass [B]: those with a coefficient other than 0.

    The ledger needs all, and ranks that share a sharded model need equal pass counts.
    """
    coefficients = [result.coefficients.cpu() for result in outcome.reduced.values()]
    if update.observation is not None or update.survey.units:
        return torch.ones(len(coefficients[0]), dtype=torch.bool)
    marks = [c != 0 if c.ndim == 1 else (c != 0).any(1) for c in coefficients]
    return torch.stack(marks).any(0)


def _may_select(update: Update) -> bool:
    """Return whether a second pass may leave out single examples; a grain must stay whole."""
    return update.find_grain_reason() is None and can_select(update.share)


def _weigh_again(
    update: Update, outcome: Outcome, micro_batch: MicroBatch, losses: Losses
) -> Weights:
    """Weight a second pass by c, which belongs to the losses of the first.

    Args:
        outcome: of this rank's share.

    Raises:
        ModelError: the losses differ from those of the first pass by more than rounding.
    """
    start, stop = micro_batch.start, micro_batch.stop
    slack = 1e-3 if update.precision == "float32" else 0.1
    for name, term in losses.items():
        before = outcome.losses[name].values[start:stop].to(term.values.device)
        scale = before.abs().mean().item()
        if not torch.allclose(term.values, before, slack, slack * scale, equal_nan=True):
            raise ModelError(
                f"The reduction needs two forward passes, and the second gave other losses in "
                f"the term {name!r} than the first, on the same examples. Something in the model "
                f"or in example_losses changes from call to call: a counter, a hidden state, a "
                f"parameter. Change it between updates, or run the batch uncut."
            )
    return Weights(outcome.coefficients(start, stop))


def _gather_sweeps(update: Update, run: Callable[[], Sweep]) -> list[Sweep]:
    """Run the sweep on every rank, and gather the results."""
    if update.group is None:
        return [run()]
    if not update.survey.units:
        return distributed.all_gather_object(run, update.group)

    def run_sweep() -> Sweep | NewFact:
        try:
            return run()
        except NewFact as fact:  # on all ranks, after the same micro-batch
            return fact

    results = fsdp.gather_through_model(run_sweep, update.group)
    for result in results:
        if isinstance(result, NewFact):
            raise result
    return [result for result in results if isinstance(result, Sweep)]


def _check_graph(sweeps: Sequence[Sweep]) -> None:
    """Refuse a batch of which no loss depends on a parameter, as `loss.backward()` would."""
    has_pass = False
    for of_rank in sweeps:
        if of_rank.has_graph:
            return
        has_pass = has_pass or of_rank.has_graph is not None
    if has_pass:
        raise LossError(
            "No loss of the batch depends on a trainable parameter, so there is no graph for a "
            "backward pass. Is the model called under torch.no_grad(), or its output detached?"
        )


def _reduce(update: Update, sweeps: Sequence[Sweep]) -> Outcome:
    """Reduce the losses of all ranks, in their order."""
    pieces, ids = [], []
    for of_rank in sweeps:
        if of_rank.losses:
            pieces.append(of_rank.losses)
            ids.append(of_rank.ids)
    losses = pieces[0] if len(pieces) == 1 else concatenate_losses(pieces)
    reduced = update.objective.reduce(losses, update.reduction_states)
    for name, result in reduced.items():
        check_finite(name, losses[name], result, ids)
    return Outcome(losses, reduced)
