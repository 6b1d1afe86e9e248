"""An update under the ledger's eyes: its parts are watched, and their figures put together.

    go back from sum_i v_i  ->  |g_i|  ->  G = sum_i c_i f_i g_i,      f_i = min(1, M / |grad m_i|)

f are the factors of `ClipExamples`, 1 without it. Where a term couples its values, or there are
several, the way back begins with c, and g_i is what the example adds. Where all c_i are the same
and there is no f, it begins with that c too, and nothing is left to be weighed: the ledger divides
by c afterwards. Elsewhere it begins with a power of two near the largest c_i, so that half
precision and hooks on activations see gradients of the size that they have unobserved.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import distributed, pytree
from anybatch.errors import AnybatchError, LedgerError
from anybatch.example_losses import Losses
from anybatch.gradient.clip import ClipExamples
from anybatch.gradient.forward_writes import copy_of
from anybatch.gradient.update import Update
from anybatch.ledger.calibration import NUM_PROBED, Part, find_plan, replace_plan
from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.ledger import Ledger, Observe
from anybatch.ledger.noise import NoiseEstimate, noise_estimate
from anybatch.ledger.plain_autograd import OneByOne
from anybatch.ledger.unplaced import UnplacedError
from anybatch.ledger.watched_pass import GradientStats, WatchedPass, disable_compile, dot_uses
from anybatch.precision import autocast
from anybatch.randomness import preserve_generators, seed_generators

__all__ = ["Watch"]


_COUPLES = "couples examples"  # how `habits` ends its word on batch normalisation


_NOT_LINEAR = (
    "A hook or a torch.autograd.Function changes gradients by their size, such as by clamping. "
    "Examples of different weights go back with another weight when they are clipped or observed, "
    "so that it would see other sizes. Leave the update unobserved and unclipped, or remove it."
)


class _Seen(NamedTuple):
    """Of one part."""

    found: GradientStats
    counts: Tensor  # n_i, 1 where g_i is what the example adds
    weights: Tensor  # c_i f_i, likewise
    unit: float  # what the g_i that were found are multiples of: the loss scale, times c if shared


class _Start(NamedTuple):
    """Beginning of a part's way back."""

    is_plain: bool  # one term, of one value an example
    values: list[Tensor]  # of the terms that have a graph
    coefficients: list[Tensor]  # theirs
    counts: Tensor  # n_i, 1 where g_i is what the example adds
    weights: Tensor  # c_i, likewise


class Watch:
    """What is asked of an update, and what its parts have shown.

    Args:
        update: as for its passes.
        observe: what to look at.
        clip: of each example.

    Raises:
        LedgerError: a model whose examples cannot be told apart.
    """

    def __init__(self, update: Update, observe: Observe, clip: ClipExamples | None) -> None:
        self._update, self._observe, self._clip = update, observe, clip
        self._seen: list[_Seen] = []
        survey = update.survey
        if observe.noise_scale:
            _check_noise(update, clip)
        self._size = min(NUM_PROBED, update.place.stop - update.place.start)
        is_drawn = update.key is not None and survey.layer is not None
        self._plan = Plan()
        if self._size:
            part = None if is_drawn else self._part
            known = survey.layer if survey.layer and survey.layer.endswith(_COUPLES) else None
            self._plan = self._find_plan(part, known)

    def _find_plan(self, part: Part | None, coupling: str | None) -> Plan:
        update, survey = self._update, self._update.survey
        roots = [update.objective.example_losses]
        everything = (survey.parameters, self._values, part, roots, coupling, self._repeats)
        try:
            return find_plan(update.model, survey.mode, *everything)
        except AnybatchError:
            raise
        except Exception:  # the loss may be written for one size of the batch alone
            size = update.place.stop - update.place.start
            if self._size == size:
                raise
            self._size = size
            return find_plan(update.model, survey.mode, *everything)

    def begin(self, size: int) -> WatchedPass | OneByOne:
        """For a forward pass of so many examples."""
        if size == 1 or self._plan.one_by_one is not None:
            return OneByOne(self._update.survey.parameters, size)
        update = self._update
        roots = [update.model, update.objective.example_losses]
        return WatchedPass(update.survey.parameters, size, self._plan, roots)

    def replan(self, error: UnplacedError) -> None:
        """Change the plan after an attempt that it has failed.

        Raises:
            UnplacedError: there is no other way.
        """
        update = self._update
        if self._size > 1:  # a rank may hold no example, and one alone needs no plan
            roots = [update.objective.example_losses]
            own = (update.model, update.survey.parameters, roots)
            replace_plan(self._plan, error, *own, self._repeats)

    def backward(
        self,
        watched: WatchedPass | OneByOne,
        losses: Losses,
        coefficients: Mapping[str, Tensor],
        scale: float,
    ) -> bool:
        """Add the part's gradient to `.grad`; returns whether any loss has a graph.

        Args:
            scale: factor by which that gradient is multiplied before it is added to the others.
        """
        update, observe = self._update, self._observe
        start = _start_of(losses, coefficients)
        if not start.values:
            self._seen.append(_Seen(GradientStats(), start.counts, start.weights, 1.0))
            return False
        is_shared = start.is_plain and self._clip is None and not observe.gradients
        shared = _shared(start.weights) if is_shared else None
        size = shared or (_size_of(start.weights) if start.is_plain else 1.0)
        is_exact = not start.is_plain or bool(
            ((start.weights == size) | (start.weights == 0)).all()
        )
        if not is_exact and not self._plan.is_linear:
            raise LedgerError(_NOT_LINEAR)
        unit = update.loss_scale * size
        clipped: list[Tensor] = []

        def weigh(squares: Tensor) -> Tensor:
            norms = squares.sqrt() / (start.counts * unit)
            assert self._clip is not None
            clipped.append(start.weights * self._clip.factors(norms))
            return clipped[0] / size

        found = watched.backward(
            start.values,
            [torch.full_like(c, unit) if start.is_plain else unit * c for c in start.coefficients],
            weights=start.weights / size if start.is_plain and shared is None else None,
            weigh=None if self._clip is None else weigh,
            keep=observe.keeps,
            whole=observe.gradients,
        )
        weights = clipped[0] if clipped else start.weights
        self._seen.append(_Seen(found, start.counts, weights * scale, unit))
        return True

    def ledger(self, sums: Mapping[str, Tensor], factor: float) -> Ledger:
        """What this rank knows once G is known; see `noise`.

        Args:
            sums: G by parameter.
            factor: what weights were still to be multiplied by when the parts were added up.
        """
        observe = self._observe
        counts = self._joined([s.counts for s in self._seen])
        every = self._joined([_squares(s, sums) for s in self._seen], len(sums))
        each_norm = _over(every.sqrt(), counts[:, None]).T
        squares = every.sum(1)
        alignment = self._alignment(sums, counts) if observe.keeps else None
        weights = factor * self._joined([s.weights for s in self._seen])
        share = None
        if alignment is not None:
            square = sum(_norm(g) ** 2 for g in sums.values())
            share = weights * counts * alignment / square
            own = [_over(squares, counts**2), alignment, counts, weights * counts]
            self._for_noise = torch.stack(own).cpu(), square  # before a penalty joins the sums
        return Ledger(
            norms=_over(squares.sqrt(), counts) if observe.norms else None,
            parameter_norms=dict(zip(sums, each_norm, strict=True))
            if observe.parameter_norms
            else None,
            alignment=alignment if observe.alignment else None,
            share=share if observe.share else None,
            gradients=self._gradients(sums, counts) if observe.gradients else None,
        )

    def noise(self) -> NoiseEstimate | None:
        """Of the batch's mean gradient, G / sum_i c_i n_i, over the shares of all ranks, once
        `ledger` has been asked for; None: it was not asked for."""
        if not self._observe.noise_scale:
            return None
        own, square = self._for_noise
        told = torch.cat(distributed.all_gather_object(lambda: own, self._update.group), 1)
        total = float(told[3].sum())
        return noise_estimate(told[0], told[1] / total, told[2], square / total**2)

    def _alignment(self, sums: Mapping[str, Tensor], counts: Tensor) -> Tensor:
        parts = []
        for seen in self._seen:
            terms = [dot_uses(uses, sums[name]) for name, uses in seen.found.uses.items()]
            found = torch.stack(terms).sum(0) if terms else torch.zeros_like(seen.counts)
            parts.append(found / seen.unit)
        return _over(self._joined(parts), counts)

    def _gradients(self, sums: Mapping[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        units = self._joined([torch.full_like(s.counts, s.unit) for s in self._seen])
        factors = _over(torch.ones_like(counts), counts * units)
        is_one, found = bool((factors == 1).all()), {}
        for name, total in sums.items():
            parts = [
                s.found.gradients[name]
                if name in s.found.gradients
                else total.new_zeros(len(s.counts), *total.shape)
                for s in self._seen
            ]
            found[name] = self._joined(parts, *total.shape)
            if not is_one:  # in place: these may be the largest tensors of all
                found[name].mul_(factors.view(-1, *[1] * total.ndim))[factors == 0] = 0
        return found

    def _joined(self, parts: list[Tensor], *rest: int) -> Tensor:
        """One after the other; of an empty share [0, *rest]."""
        if not parts:
            return torch.zeros(0, *rest, device=self._update.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _values(self, context: AbstractContextManager[object]) -> Tensor:
        return self._forward(self._few(0, self._size), context)

    def _part(self, start: int, stop: int) -> Tensor:
        return self._forward(self._few(start, stop), nullcontext())

    def _repeats(
        self, context: AbstractContextManager[object], before: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """The first and the last example among the others, and each among copies of itself.

        Shapes and with them random numbers are the same, so that models that draw can be compared.
        """
        few, ends = self._few(0, self._size), [0, self._size - 1]
        whole = self._forward(few, context, before).detach()
        alone = [
            self._forward(pytree.repeat_example(few, i), context, before).detach()[i] for i in ends
        ]
        return whole[ends], torch.stack(alone)

    def _few(self, start: int, stop: int) -> Any:
        return pytree.take_examples(self._update.share, start, stop)

    def _forward(
        self,
        few: Any,
        context: AbstractContextManager[object],
        before: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The values of a few examples, the random numbers always those of the first grain."""
        update, num_examples = self._update, pytree.count_examples(few)
        before()
        piece = copy_of(pytree.prepare_batch(few, update.device))
        with preserve_generators(update.device), torch.enable_grad():
            seed_generators(0 if update.key is None else update.key.grain(0), update.device)
            with disable_compile(), context, autocast(update.precision, update.device):
                losses = update.objective.losses(update.model, piece, num_examples)
        flat = [term.values.reshape(num_examples, -1).sum(1) for term in losses.values()]
        return torch.stack(flat).sum(0)


def _norm(gradient: Tensor) -> float:
    dtype = torch.promote_types(gradient.dtype, torch.float64)
    return float(torch.linalg.vector_norm(gradient.to(dtype)))


def _check_noise(update: Update, clip: ClipExamples | None) -> None:
    reductions = list(update.objective.reductions.values())
    if len(reductions) != 1 or reductions[0].factor(1.0, 1) is None or clip is not None:
        raise LedgerError(
            "the noise scale is that of a mean of examples, expected one term under Mean or Sum "
            "and no ClipExamples. Leave noise_scale out of what is observed."
        )


def _shared(weights: Tensor) -> float | None:
    """The weight that all examples have, None where they differ or it is 0."""
    if len(weights) == 0:
        return None
    low, high = (float(w) for w in weights.aminmax())
    return low if low == high and low != 0 and math.isfinite(low) else None


def _start_of(losses: Losses, coefficients: Mapping[str, Tensor]) -> _Start:
    reached = [(t.values, coefficients[name]) for name, t in losses.items()]
    reached = [(v, c.to(v.device, v.dtype)) for v, c in reached if v.requires_grad]
    term = next(iter(losses.values()))
    is_plain = len(losses) == 1 and term.values.ndim == 1
    ones = torch.ones(len(term.values), device=term.values.device, dtype=term.values.dtype)
    counts = term.weights.to(ones) if is_plain else ones
    weights = reached[0][1] if is_plain and reached else ones
    return _Start(is_plain, [v for v, _ in reached], [c for _, c in reached], counts, weights)


def _size_of(weights: Tensor) -> float:
    """Power of two near the largest weight, so that gradients go back in about their own size."""
    largest = float(weights.abs().max()) if len(weights) else 0.0
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** round(math.log2(largest))


def _squares(seen: _Seen, names: Iterable[str]) -> Tensor:
    """|g_i|^2 of each parameter [B, parameters], 0 where nothing has reached it."""
    none = torch.zeros_like(seen.counts)
    found = torch.stack([seen.found.squares.get(name, none) for name in names], 1)
    return found if seen.unit == 1 else found / seen.unit**2


def _over(values: Tensor, counts: Tensor) -> Tensor:
    """values / n_i, 0 where n_i = 0."""
    return torch.where(counts > 0, values / counts, 0)
