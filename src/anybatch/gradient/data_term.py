"""Gradient of the data term: forward, reduce, backward, and sum over micro-batches and ranks.

    G = sum_i c_i grad v_i,    c_i = dR/dv_i over the whole batch

The coefficients c are needed before a backward pass. How they come to be known depends on the
batch and on R:

    uncut       forward, R, backward with c
    linear R    forward and backward for each micro-batch, with a seed s; c/s multiplies the sum
    any other   forward for all without a graph, R; then forward and backward with c

If R is linear and there are no counts, c is known beforehand and s = c. With counts n_i,

    s = 2^round(log2(1 / (B * mean n of the micro-batch))),    G = c * sum_m G_m / s

over the micro-batches m.

Multiplying by powers of two changes no bit. Gradients keep the size that they have uncut, so half
precision overflows, and hooks on activations see, what they would in an uncut batch.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch import distributed
from anybatch._torch import multiply_in_place
from anybatch.distributed import fsdp
from anybatch.errors import LossError, ModelError
from anybatch.example_losses import ExampleLosses, Losses, concatenate_losses, list_outputs
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.passes import run_backward, run_forward
from anybatch.gradient.survey import NewFact
from anybatch.gradient.update import PaddingPasses, Update
from anybatch.layout import MicroBatch, ShareRange
from anybatch.objective import check_finite
from anybatch.randomness import control_draws, preserve_generators
from anybatch.reduction import Reduced, Reduction

__all__ = ["Cut", "Outcome", "sum_data_term"]

Coefficients = Mapping[str, Tensor]
Cut = Callable[[], list[MicroBatch]]


@dataclass(frozen=True)
class Outcome:
    """Losses of the whole batch, and the result of each reduction."""

    losses: Losses
    reduced: Mapping[str, Reduced]
    factor: float = 1.0  # factor between the sum over micro-batches and G

    def coefficients(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return c of examples start .. stop-1 of the batch, by term."""
        coefficients = {}
        for name, result in self.reduced.items():
            c = result.coefficients
            coefficients[name] = c if stop - start == len(c) else c[start:stop]
        return coefficients


class Weights(NamedTuple):
    """Weights of a micro-batch's examples in its backward pass."""

    coefficients: Coefficients
    scale: float = 1.0  # its gradient is multiplied by this before it is added to the sum
    outcome: Outcome | None = None  # if the micro-batch is the whole batch


class Sweep(NamedTuple):
    """Result of the passes over all micro-batches of a rank."""

    losses: Losses  # of the share; empty if the share is, or if they are already known
    ids: Tensor | None
    has_graph: bool | None  # whether any loss has a graph; None: there was no backward pass
    outcome: Outcome | None


Weigh = Callable[[MicroBatch, Losses], Weights]


def sum_data_term(
    update: Update, cut: Cut, buffers: Buffers | None, accumulator: Accumulator
) -> Outcome:
    """Leave the gradient of the data term, summed over all ranks, in the accumulator.

    Args:
        cut: lists the micro-batches of this share. If it raises an error, all ranks raise it.
        buffers: collects the model's buffers; None: it has none.
    """
    sweep = partial(_sweep, update, cut, buffers, accumulator)
    reduction = update.objective.linear_reduction
    is_alone = update.group is None and not update.is_bitwise
    is_uncut = is_alone and len(cut()) == 1
    is_cut = not is_uncut and (reduction is None or update.group is not None or len(cut()) > 1)
    update.writes.is_cut = is_cut
    if is_uncut:
        sweeps = _gather_sweeps(update, partial(sweep, partial(_weigh_uncut, update)))
    elif reduction is not None:
        sweeps = _gather_sweeps(update, partial(sweep, partial(_weigh_linear, update, reduction)))
    else:
        outcome = _reduce(update, _gather_sweeps(update, partial(sweep, None)))
        weigh = partial(_weigh_again, update, outcome)
        only = _select_needed(update, cut(), outcome)
        sweeps = _gather_sweeps(update, partial(sweep, weigh, only=only))
    _check_graph(sweeps)
    if is_uncut and sweeps[0].outcome is not None:
        outcome = sweeps[0].outcome
    elif reduction is not None:
        outcome = _complete_linear(update, reduction, _reduce(update, sweeps))
    accumulator.sum_over_ranks()
    if outcome.factor != 1:
        multiply_in_place(list(accumulator.sums.values()), outcome.factor)
    return outcome


def _weigh_uncut(update: Update, micro_batch: MicroBatch, losses: Losses) -> Weights:
    """Reduce the whole batch at once."""
    outcome = _reduce(update, [Sweep(losses, update.ids, None, None)])
    return Weights(outcome.coefficients(0, micro_batch.stop), 1.0, outcome)


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


def _weigh_again(
    update: Update, outcome: Outcome, micro_batch: MicroBatch, losses: Losses
) -> Weights:
    """Weight a second pass by c, which belongs to the losses of the first.

    Raises:
        ModelError: the losses differ from those of the first pass by more than rounding.
    """
    start = update.share_range.start + micro_batch.start
    stop = start + micro_batch.size
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


def _select_needed(
    update: Update, micro_batches: list[MicroBatch], outcome: Outcome
) -> set[MicroBatch]:
    """Select the micro-batches that need a second pass: those with a coefficient other than 0.

    No grain couples with another, so one whose coefficients are all 0 can be skipped. The ledger
    needs every example, and ranks that share a sharded model need equal pass counts.
    """
    if update.observation is not None or update.survey.units:
        return set(micro_batches)
    start = update.share_range.start
    return {
        m
        for m in micro_batches
        if any(c.any() for c in outcome.coefficients(start + m.start, start + m.stop).values())
    }


def _sweep(
    update: Update,
    cut: Cut,
    buffers: Buffers | None,
    accumulator: Accumulator,
    weigh: Weigh | None,
    *,
    only: Collection[MicroBatch] | None = None,
) -> Sweep:
    """Run each micro-batch forward, and backward with the weights of `weigh` if there is one.

    Every micro-batch starts from the buffers before the update. A second sweep, over `only` some
    micro-batches, collects neither buffers nor losses.
    """
    pieces: list[Losses] = []
    has_graph, outcome, total = None, None, update.share_range.total
    with accumulator.backward_passes() if weigh is not None else nullcontext():
        for micro_batch in cut():
            accumulator.discard()
            if only is not None and micro_batch not in only:
                accumulator.add(micro_batch)  # zeros, which are a leaf of the tree too
                continue
            if buffers is not None:
                buffers.restore()
            has_grad = weigh is not None or update.facts.needs_graph
            with torch.set_grad_enabled(has_grad), _control_draws(update, micro_batch):
                losses, watched = run_forward(update, micro_batch, goes_back=weigh is not None)
                detached = _detach(update, losses)
                if only is None:
                    pieces.append(detached)
                    update.outputs.append(list_outputs(losses))
                    if buffers is not None:  # activation checkpointing runs forward again later
                        buffers.collect(micro_batch, micro_batch.size / total)
                if weigh is not None:
                    coefficients, scale, outcome = weigh(micro_batch, detached)
                    accumulator.begin(scale)
                    reaches = run_backward(update, losses, coefficients, watched, scale)
                    has_graph = reaches or bool(has_graph)
            if weigh is not None:
                accumulator.add(micro_batch)
        _run_padding(update, update.padding, accumulator, goes_back=weigh is not None)
        if weigh is not None:
            accumulator.finish()
    losses = {} if outcome or not pieces else concatenate_losses(pieces)
    return Sweep(losses, update.ids, has_graph, outcome)


def _control_draws(update: Update, micro_batch: MicroBatch) -> AbstractContextManager[None]:
    """Seed the generators by the grain of a micro-batch. Without a key, detect draws."""
    seed = None
    if update.key is not None and micro_batch.grain is not None:
        seed = update.key.grain(micro_batch.grain)
    # NumPy and `random` take longer to compare. They are left out once an update drew nothing.
    others = update.facts.draws is not False
    return control_draws(update.device, seed, others=others, error=NewFact("draws"))


def _run_padding(
    update: Update, padding: PaddingPasses | None, accumulator: Accumulator, *, goes_back: bool
) -> None:
    """Run dummy passes, if other ranks need this one's slice of the model in theirs."""
    if padding is None:
        return
    micro_batch, size = MicroBatch(0, padding.size), padding.size
    update = replace(update, share=padding.share, share_range=ShareRange(0, size, size))
    is_seeded = update.find_grain_reason() is not None
    needs_graph = goes_back or update.facts.needs_graph
    with preserve_generators(update.device), torch.set_grad_enabled(needs_graph):
        for _ in range(padding.num_passes):
            with nullcontext() if is_seeded else _control_draws(update, micro_batch):
                losses, _ = run_forward(update, micro_batch, goes_back=goes_back)
                if goes_back:
                    zeros = {name: torch.zeros_like(t.values) for name, t in losses.items()}
                    accumulator.begin()
                    run_backward(update, losses, zeros, None)
                    accumulator.add(micro_batch)


def _gather_sweeps(update: Update, sweep: Callable[[], Sweep]) -> list[Sweep]:
    """Run the sweep on every rank, and gather the results."""
    if update.group is None:
        return [sweep()]
    if not update.survey.units:
        return distributed.all_gather_object(sweep, update.group)

    def run_sweep() -> Sweep | NewFact:
        try:
            return sweep()
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
    for sweep in sweeps:
        if sweep.has_graph:
            return
        has_pass = has_pass or sweep.has_graph is not None
    if has_pass:
        raise LossError(
            "No loss of the batch depends on a trainable parameter, so there is no graph for a "
            "backward pass. Is the model called under torch.no_grad(), or its output detached?"
        )


def _detach(update: Update, losses: Losses) -> Losses:
    """Detach losses, and move them to the CPU if they travel to other ranks, or might."""
    detached = {}
    for name, term in losses.items():
        detached[name] = term.map(torch.detach)
        if update.group is not None or update.is_bitwise:
            detached[name] = detached[name].map(Tensor.cpu)
    return detached


def _reduce(update: Update, sweeps: Sequence[Sweep]) -> Outcome:
    """Reduce the losses of all ranks, in their order."""
    pieces, ids = [], []
    for sweep in sweeps:
        if sweep.losses:
            pieces.append(sweep.losses)
            ids.append(sweep.ids)
    losses = pieces[0] if len(pieces) == 1 else concatenate_losses(pieces)
    reduced = update.objective.reduce(losses, update.reduction_states)
    for name, result in reduced.items():
        check_finite(name, losses[name], result, ids)
    return Outcome(losses, reduced)
