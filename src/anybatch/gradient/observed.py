"""Observe each example of an update through the ledger.

    backward from sum_i v_i  ->  |g_i|  ->  G = sum_i c_i f_i g_i,      f_i = min(1, M / |grad m_i|)

f are the factors of `ClipExamples`, 1 without it. With several terms, or a term that couples its
values, the backward pass starts with c, and g_i is what the example adds. It also starts with c if
all c_i are equal and there is no f; the ledger divides by c afterwards. Otherwise it starts with a
power of two near the largest c_i, so that half precision and hooks on activations see gradients of
about the size that they have without the ledger.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import distributed
from anybatch.errors import AnybatchError, LedgerError
from anybatch.example_losses import Losses
from anybatch.gradient.clip import ClipExamples
from anybatch.gradient.survey import COUPLES
from anybatch.gradient.update import ObservedPass, Update
from anybatch.ledger.calibration import NUM_PROBED, Part, find_plan, replace_plan
from anybatch.ledger.contractions.base import widen
from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.gradient_stats import GradientStats, Projector, dot_uses
from anybatch.ledger.graph_pass import GraphPass
from anybatch.ledger.ledger import Ledger, Observe
from anybatch.ledger.noise import NoiseEstimate, choose_stride, noise_estimate
from anybatch.ledger.plain_autograd import OneByOne
from anybatch.ledger.trial_run import disable_compile
from anybatch.ledger.unplaced import UnplacedError
from anybatch.ledger.watched_pass import WatchedPass, is_confirmed_now
from anybatch.precision import autocast
from anybatch.pytree import (
    copy_batch,
    count_examples,
    list_sizes,
    prepare_batch,
    repeat_example,
    take_examples,
    take_few,
)
from anybatch.randomness import preserve_generators, seed_generators

__all__ = ["ObservedUpdate"]

_NOT_LINEAR = (
    "A hook or a torch.autograd.Function changes gradients by their size, such as by clamping. "
    "Examples of different weights go back with another weight when they are clipped or observed, "
    "so that it would see other sizes. Leave the update unobserved and unclipped, or remove it."
)


class _Record(NamedTuple):
    """Figures of one micro-batch."""

    collected: GradientStats
    counts: Tensor  # n_i, 1 where g_i is what the example adds
    weights: Tensor  # c_i f_i, likewise
    unit: float  # factor of the collected g_i: the loss scale, times c if all are equal


class _Start(NamedTuple):
    """Start of a micro-batch's backward pass."""

    is_plain: bool  # one term, of one value per example
    values: list[Tensor]  # of the terms that have a graph
    coefficients: list[Tensor]  # theirs
    counts: Tensor  # n_i, 1 where g_i is what the example adds
    weights: Tensor  # c_i, likewise


class ObservedUpdate:
    """Watches the passes of an update, and computes its ledger.

    Args:
        update: as for its passes.
        observe: quantities to compute.
        clip: of each example.

    Raises:
        LedgerError: a model whose examples cannot be separated.
    """

    def __init__(self, update: Update, observe: Observe, clip: ClipExamples | None) -> None:
        self._update, self._observe, self._clip = update, observe, clip
        self._records: list[_Record] = []
        size, parameters = observe.projections, update.survey.parameters
        self._projector = Projector(parameters, size) if size else None
        if observe.noise_scale:
            _check_noise(update, clip)
        self._probe = Probe(update)
        self._plan = self._probe.find_plan()
        self.reads_graph = self._plan.graph is not None and self._may_read_graph()

    def begin(self, size: int) -> ObservedPass:
        """Watch a forward pass of so many examples."""
        if size == 1 or self._plan.one_by_one is not None:
            return OneByOne(self._update.survey.parameters, size)
        if self.reads_graph:
            return GraphPass(self._update.survey.parameters, self._plan)
        roots = [self._update.model, self._update.objective.example_losses]
        return WatchedPass(self._update.survey.parameters, size, self._plan, roots)

    def _may_read_graph(self) -> bool:
        """Return whether this step's passes can be plain ones; see `graph_pass`.

        All examples must have one weight, since autograd computes the sums.
        """
        update, facts = self._update, self._update.facts
        has_one_weight = update.objective.linear_reduction is not None and self._clip is None
        is_plain = not (update.is_bitwise or update.has_kernels or self._observe.gradients)
        is_repeatable = not (facts.changes_batch or facts.needs_graph)
        is_due = is_confirmed_now(self._plan)
        return has_one_weight and is_plain and is_repeatable and not is_due

    def replan(self, error: UnplacedError) -> None:
        """Change the plan after an attempt in which it has failed.

        Raises:
            UnplacedError: there is no other way.
        """
        self._probe.replan(self._plan, error)

    def backward(
        self,
        watched: ObservedPass,
        losses: Losses,
        coefficients: Mapping[str, Tensor],
        scale: float,
    ) -> bool:
        """Add a micro-batch's gradient to `.grad`; return whether any loss has a graph.

        Args:
            scale: factor by which this gradient is multiplied before it is added to the others.
        """
        observe, start = self._observe, _start_backward(losses, coefficients)
        if not start.values:
            self._records.append(_Record(GradientStats(), start.counts, start.weights, 1.0))
            return False
        may_share = start.is_plain and self._clip is None and not observe.gradients
        shared = _find_shared(start.weights) if may_share else None
        size = shared or (_round_size(start.weights) if start.is_plain else 1.0)
        if start.is_plain and shared is None and not self._plan.is_linear:
            is_equal = (start.weights == size) | (start.weights == 0)
            if not is_equal.all():
                raise LedgerError(_NOT_LINEAR)
        unit = self._update.loss_scale * size
        clipped: list[Tensor] = []

        def weigh(squares: Tensor) -> Tensor:
            norms = squares.sqrt() / (start.counts * unit)
            assert self._clip is not None
            clipped.append(start.weights * self._clip.factors(norms))
            return clipped[0] / size

        collected = watched.backward(
            start.values,
            [torch.full_like(c, unit) if start.is_plain else unit * c for c in start.coefficients],
            weights=start.weights / size if start.is_plain and shared is None else None,
            weigh=None if self._clip is None else weigh,
            keep_uses=observe.keeps,
            keep_gradients=observe.gradients,
            projector=self._projector,
        )
        weights = clipped[0] if clipped else start.weights
        self._records.append(_Record(collected, start.counts, weights * scale, unit))
        return True

    def ledger(self, sums: Mapping[str, Tensor], factor: float) -> Ledger:
        """Compute this rank's ledger once G is known; see `noise`.

        Args:
            sums: G by parameter.
            factor: of the weights, which the sum over micro-batches left out.
        """
        observe = self._observe
        counts = self._concatenate([r.counts for r in self._records])
        per_parameter = self._concatenate([_squares(r, sums) for r in self._records], len(sums))
        squares = per_parameter.sum(1)
        alignment = share = None
        if observe.keeps:
            alignment = self._alignment(sums, counts)
            weights = factor * self._concatenate([r.weights for r in self._records])
            square = sum(map(_square, sums.values()))
            share = weights * counts * alignment / square
            rows = [_divide(squares, counts**2), alignment, counts, weights * counts]
            self._for_noise = torch.stack(rows).cpu(), square  # before a penalty joins the sums
        return Ledger(
            norms=_divide(squares.sqrt(), counts) if observe.norms else None,
            parameter_norms=self._norms_by_parameter(per_parameter, counts, sums)
            if observe.parameter_norms
            else None,
            alignment=alignment if observe.alignment else None,
            share=share if observe.share else None,
            gradients=self._gradients(sums, counts) if observe.gradients else None,
            projections=self._projections(counts) if observe.projections else None,
        )

    def noise(self) -> NoiseEstimate | None:
        """Estimate the noise of the mean gradient, G / sum_i c_i n_i, once `ledger` is made."""
        if not self._observe.noise_scale:
            return None
        rows, square = self._for_noise
        columns = torch.cat(distributed.all_gather_object(lambda: rows, self._update.group), 1)
        total = float(columns[3].sum())
        return noise_estimate(columns[0], columns[1] / total, columns[2], square / total**2)

    def _alignment(self, sums: Mapping[str, Tensor], counts: Tensor) -> Tensor:
        """Compute <grad m_i, G>; nan for examples that the noise scale does not need."""
        observe, products = self._observe, []
        is_whole = observe.alignment or observe.share or self._update.group is not None
        stride = 1 if is_whole else choose_stride(counts)
        for record in self._records:
            zero, names = torch.zeros_like(record.counts), record.collected.uses
            dots = [dot_uses(uses, sums[name], stride) for name, uses in names.items()]
            inner = torch.full_like(zero, math.nan if dots else 0.0)
            inner[::stride] = torch.stack([zero[::stride], *dots]).sum(0) / record.unit
            products.append(inner)
        return _divide(self._concatenate(products), counts)

    def _norms_by_parameter(
        self, squares: Tensor, counts: Tensor, names: Iterable[str]
    ) -> dict[str, Tensor]:
        norms = _divide(squares.sqrt(), counts[:, None]).T
        return dict(zip(names, norms, strict=True))

    def _gradients(self, sums: Mapping[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        units = self._concatenate([torch.full_like(r.counts, r.unit) for r in self._records])
        factors = _divide(torch.ones_like(counts), counts * units)
        is_one, gradients = bool((factors == 1).all()), {}
        for name, total in sums.items():
            pieces = [
                r.collected.gradients[name]
                if name in r.collected.gradients
                else total.new_zeros(len(r.counts), *total.shape)
                for r in self._records
            ]
            gradients[name] = self._concatenate(pieces, *total.shape)
            if not is_one:  # in place: these may be the largest tensors of all
                gradients[name].mul_(factors.view(-1, *[1] * total.ndim))[factors == 0] = 0
        return gradients

    def _projections(self, counts: Tensor) -> Tensor:
        size = self._observe.projections
        pieces = [
            r.counts.new_zeros(len(r.counts), size)
            if r.collected.projections is None
            else r.collected.projections / r.unit
            for r in self._records
        ]
        return _divide(self._concatenate(pieces, size), counts[:, None])

    def _concatenate(self, pieces: list[Tensor], *rest: int) -> Tensor:
        """Concatenate the micro-batches; an empty share gives [0, *rest]."""
        if not pieces:
            return torch.zeros(0, *rest, device=self._update.device)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Probe:
    """Forward passes over a few examples, which find a plan to separate them."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._whole = max(list_sizes(update.share) or (update.share_range.size,))
        self._size = min(NUM_PROBED, self._whole)

    def find_plan(self) -> Plan:
        """Find a plan; an empty one unless there are two examples to separate."""
        update, layer = self._update, self._update.survey.layer
        if self._whole < 2:
            return Plan()
        part = None if update.key is not None and layer is not None else self._run_range
        coupling = layer if layer and layer.endswith(COUPLES) else None
        try:
            return self._plan_of(part, coupling)
        except AnybatchError:
            raise
        except Exception:  # the loss may be written for one batch size alone
            if self._size == self._whole:
                raise
            self._size = self._whole
            return self._plan_of(part, coupling)

    def replan(self, plan: Plan, error: UnplacedError) -> None:
        """Change a plan that has failed; a rank with at most one example needs none."""
        update = self._update
        if self._size > 1:
            roots = [update.objective.example_losses]
            replace_plan(plan, error, update.model, update.survey.parameters, roots, self._repeat)

    def _plan_of(self, part: Part | None, coupling: str | None) -> Plan:
        update, survey = self._update, self._update.survey
        roots = [update.objective.example_losses]
        options = (survey.parameters, self._run_all, part, roots, coupling, self._repeat)
        return find_plan(update.model, survey.mode, *options)

    def _run_all(self, context: AbstractContextManager[object]) -> Tensor:
        return self._forward(self._take(0, self._size), context)

    def _run_range(self, start: int, stop: int) -> Tensor:
        return self._forward(self._take(start, stop), nullcontext())

    def _repeat(
        self, context: AbstractContextManager[object], before: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Run the first and the last example among the others, and each among copies of itself.

        Shapes, and so random numbers, are the same. Models that draw can be compared this way.
        """
        batch, ends = self._take(0, self._size), [0, self._size - 1]
        whole = self._forward(batch, context, before).detach()
        alone = []
        for i in ends:
            copies = repeat_example(batch, i)
            alone.append(self._forward(copies, context, before).detach()[i])
        return whole[ends], torch.stack(alone)

    def _take(self, start: int, stop: int) -> Any:
        return take_examples(take_few(self._update.share, self._whole), start, stop)

    def _forward(
        self,
        batch: Any,
        context: AbstractContextManager[object],
        before: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Compute the values of a few examples, always with the draws of the first grain."""
        update, num_examples = self._update, count_examples(batch)
        before()
        batch = copy_batch(prepare_batch(batch, update.device))
        with preserve_generators(update.device), torch.enable_grad():
            seed_generators(0 if update.key is None else update.key.grain(0), update.device)
            with disable_compile(), context, autocast(update.precision, update.device):
                losses = update.objective.losses(update.model, batch, num_examples)
        (first, *others) = losses.values()
        if not others and first.values.ndim == 1:
            return first.values
        flat = [term.values.reshape(num_examples, -1).sum(1) for term in losses.values()]
        return torch.stack(flat).sum(0)


def _square(gradient: Tensor) -> float:
    """Compute |G|^2; float64 for each element would take three times as long."""
    rows: Tensor = widen(gradient).flatten(1) if gradient.ndim > 1 else widen(gradient).view(1, -1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _check_noise(update: Update, clip: ClipExamples | None) -> None:
    reductions = list(update.objective.reductions.values())
    if len(reductions) != 1 or reductions[0].factor(1.0, 1) is None or clip is not None:
        raise LedgerError(
            "The noise scale is that of a mean of examples. It needs one term under Mean or Sum, "
            "and no ClipExamples. Leave noise_scale out of what is observed."
        )


def _find_shared(weights: Tensor) -> float | None:
    """Return the weight that all examples have; None if they differ or it is 0."""
    if not weights.numel():
        return None
    low, high = (float(end) for end in weights.aminmax())
    return low if low == high and low != 0 and math.isfinite(low) else None


def _start_backward(losses: Losses, coefficients: Mapping[str, Tensor]) -> _Start:
    values, weights = [], []
    for name, term in losses.items():
        if term.values.requires_grad:
            values.append(term.values)
            weights.append(coefficients[name].to(term.values.device, term.values.dtype))
    term = next(iter(losses.values()))
    is_plain = len(losses) == 1 and term.values.ndim == 1
    ones = term.values.new_ones(term.values.shape[:1])
    counts = ones if term.counts is None or not is_plain else term.counts.to(ones)
    return _Start(is_plain, values, weights, counts, weights[0] if is_plain and weights else ones)


def _round_size(weights: Tensor) -> float:
    """Return a power of two near the largest weight, so that gradients keep about their size."""
    largest = float(weights.abs().max()) if len(weights) else 0.0
    is_usable = largest != 0 and math.isfinite(largest)
    return 2.0 ** round(math.log2(largest)) if is_usable else 1.0


def _squares(record: _Record, names: Iterable[str]) -> Tensor:
    """Return |g_i|^2 of each parameter [B, parameters], 0 where nothing has reached it."""
    zeros = torch.zeros_like(record.counts)
    squares = torch.stack([record.collected.squares.get(name, zeros) for name in names], 1)
    return squares if record.unit == 1 else squares / record.unit**2


def _divide(values: Tensor, counts: Tensor) -> Tensor:
    """Divide by n_i; 0 where n_i = 0."""
    return torch.where(counts > 0, values / counts, 0)
