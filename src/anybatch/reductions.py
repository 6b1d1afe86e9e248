"""Reductions: from the values of a whole batch to one scalar, and each example's coefficient.

    R(v_1 .. v_B),    c_i = dR/dv_i

    v_i value, n_i count, m_i = v_i / n_i, B the number of examples with n_i > 0.
    Examples with n_i = 0 take no part: c_i = 0. Where all are 0 there is nothing to reduce.

A reduction is pure: `reduce(losses, state)` returns the value, the coefficients and the next
state, which the training loop commits once the update has been made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from anybatch.batch import ExampleLosses
from anybatch.errors import LossError

__all__ = [
    "Function",
    "GroupDRO",
    "Max",
    "Mean",
    "Reduced",
    "Reduction",
    "Scaled",
    "Sum",
    "Tilted",
    "TopFraction",
    "as_reduction",
]


class Reduced(NamedTuple):
    """What a reduction makes of a whole batch."""

    value: Tensor  # 0-d, R
    coefficients: Tensor  # shaped like the values, dR/dv
    state: Tensor | None = None  # for the next step; None where the reduction has none


class Reduction(ABC):
    """A differentiable function of the values of a batch to a scalar."""

    def factor(self, total_count: float) -> float | None:
        """c_i where R is linear in the values, given the sum of counts; None where it is not."""
        return None

    @abstractmethod
    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        """Value and coefficients, the losses being checked; c_i where n_i = 0 does not matter."""

    def reduce(self, losses: ExampleLosses, state: Tensor | None = None) -> Reduced:
        """Reduce the values of a whole batch.

        Args:
            losses: values [B] or [B, k], counts [B], groups [B], without a graph.
            state: what this reduction returned at the last step, None at the first.

        Returns:
            R, dR/dv exact to rounding, and the next state.

        Raises:
            LossError: a negative count, all counts 0, or a shape that R cannot take.
        """
        present = losses.present
        if losses.counts is not None:
            _check_counts(losses.counts, present)
        if not len(present):
            raise LossError("expected at least one example in the batch, got none.")
        value, coefficients, state = self._reduce(losses, state)
        if losses.counts is not None:
            shown = present if coefficients.ndim == 1 else present[:, None]
            coefficients = torch.where(shown, coefficients, 0)
        return Reduced(value, coefficients, state)

    def __mul__(self, factor: float) -> "Scaled":
        return Scaled(float(factor), self)

    __rmul__ = __mul__


class _Linear(Reduction):
    """R = factor * sum v."""

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        v = _masked(losses)
        total = len(v) if losses.counts is None else losses.counts.double().sum().item()
        c = self.factor(total)
        assert c is not None
        return Reduced(c * v.sum(), torch.full_like(v, c))


@final
@dataclass(frozen=True)
class Mean(_Linear):
    """sum v / sum n: the plain mean, the token mean and the weighted mean in one formula."""

    def factor(self, total_count: float) -> float:
        return 1 / total_count


@final
@dataclass(frozen=True)
class Sum(_Linear):
    """sum v: B times the mean where all counts are 1."""

    def factor(self, total_count: float) -> float:
        return 1.0


@final
@dataclass(frozen=True)
class Max(Reduction):
    """max m_i; ties share equally. Its objective changes with the batch size."""

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        m, n = _means(losses, self)
        ties = m == m.max()
        return Reduced(m.max(), ties / (n * ties.sum()))


@final
@dataclass(frozen=True)
class TopFraction(Reduction):
    """Mean of the fraction q of the largest m_i. Its objective changes with the batch size.

    With k = max(qB, 1): the floor(k) largest m, plus (k - floor(k)) of the next, over k.
    Ties at the cut share what is left for them equally.

    Source: average top-k, Fan et al. 2017, 1705.08826; CVaR, Rockafellar and Uryasev 2000.
    """

    q: float

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise LossError(f"TopFraction expects a fraction 0 < q <= 1, got {self.q}.")

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        m, n = _means(losses, self)
        num_examples = int(losses.present.sum())
        k = max(round(self.q * num_examples, 9), 1.0)  # 0.1 * 30 is 3, not 3.0000000000000004
        cut = m.sort(descending=True).values[-int(-k // 1) - 1]
        above, ties = m > cut, m == cut
        weight = above + ties * ((k - above.sum()) / ties.sum())
        kept = torch.where(weight > 0, m, 0)
        return Reduced((weight * kept).sum() / k, (weight / (k * n)).to(m.dtype))


@final
@dataclass(frozen=True)
class Tilted(Reduction):
    """(1/t) log((1/B) sum exp(t m_i)): from the mean (t to 0) to the maximum (t to infinity).

    Its objective changes with the batch size. Source: Li et al. 2021, 2007.01162, equation 2.
    """

    t: float

    def __post_init__(self) -> None:
        if self.t == 0 or not abs(self.t) < float("inf"):
            raise LossError(f"Tilted expects a finite t other than 0 (use Mean), got {self.t}.")

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        m, n = _means(losses, self)
        present = losses.present
        tilted = torch.where(present, self.t * m, -torch.inf)
        value = (tilted.logsumexp(0) - present.sum().to(m.dtype).log()) / self.t
        return Reduced(value, tilted.softmax(0) / n)


@final
@dataclass(frozen=True)
class GroupDRO(Reduction):
    """sum_g q_g L_g,  L_g = (sum of v in g) / n_g,  n_g the sum of counts in g.

    The state is q, a distribution over the groups. A step first tilts it towards the groups
    with the larger loss, q_g ~ q_g exp(eta L_g), then weighs the losses with the new q. Groups
    absent from a batch keep their q; one seen for the first time enters with an equal share.

    Source: Sagawa et al. 2020, 1911.08731, algorithm 1.
    """

    eta: float

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        if losses.groups is None:
            raise LossError(
                "GroupDRO expects ExampleLosses(values, groups=[B] of integers), got no groups."
            )
        v, group = _vector(losses, self).double(), losses.groups.long()
        if int(group.min()) < 0:
            raise LossError(f"GroupDRO expects groups from 0, got {int(group.min())}.")
        q = _entered(state, int(group.max()) + 1).to(v.device)
        count = torch.zeros_like(q).index_add_(0, group, losses.weights.double())
        loss = torch.zeros_like(q).index_add_(0, group, v) / count
        here = count > 0
        tilt = (q[here].log() + self.eta * loss[here]).softmax(0)
        q = q.index_put((here.nonzero()[:, 0],), tilt * q[here].sum())
        c = (q / count)[group].to(losses.values.dtype)
        return Reduced((q * loss)[here].sum().to(c.dtype), c, q.cpu())


@final
@dataclass(frozen=True)
class Function(Reduction):
    """Any function from `ExampleLosses` to a scalar; coefficients by autograd on the values.

    Values may be [B, k], embeddings for instance, and the function may couple examples.
    """

    function: Callable[[ExampleLosses], Tensor]

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        values = losses.values.detach().requires_grad_()
        with torch.enable_grad():
            whole = ExampleLosses(values, losses.counts, losses.groups, losses.metrics)
            value = self.function(whole)
            if not isinstance(value, Tensor) or value.ndim != 0:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise LossError(
                    f"expected the reduction {self.function!r} to return a 0-d tensor, got {came}."
                )
            if not value.requires_grad:
                return Reduced(value.detach(), torch.zeros_like(losses.values))
            (c,) = torch.autograd.grad(value, values)
        return Reduced(value.detach(), c)


@final
@dataclass(frozen=True)
class Scaled(Reduction):
    """factor * R."""

    scale: float
    reduction: Reduction

    def factor(self, total_count: float) -> float | None:
        inner = self.reduction.factor(total_count)
        return None if inner is None else self.scale * inner

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        value, c, state = self.reduction._reduce(losses, state)
        return Reduced(self.scale * value, self.scale * c, state)


def as_reduction(given: object) -> Reduction:
    """The reduction itself, or a function wrapped as one.

    Raises:
        LossError: anything else, such as a string.
    """
    if isinstance(given, Reduction):
        return given
    if callable(given) and not isinstance(given, type):
        return Function(given)
    raise LossError(
        f"expected a reduction such as ab.Mean(), or a function of ab.ExampleLosses, got {given!r}."
    )


def _check_counts(counts: Tensor, present: Tensor) -> None:
    wrong = (~(counts >= 0)).nonzero()
    if len(wrong):
        raise LossError(
            f"expected counts (or weights) of at least 0, got {counts[wrong[0, 0]].item()} for "
            f"example {wrong[0, 0].item()} of the batch. A weight below 0 has no mean."
        )
    if not present.any():
        raise LossError(
            "all counts of the batch are 0, expected at least one example that takes part. "
            "Is every token masked, or every sample weight 0?"
        )


def _masked(losses: ExampleLosses) -> Tensor:
    """Values, 0 where n_i = 0 (whatever the model yields there, NaN included)."""
    if losses.counts is None:
        return losses.values
    present = losses.present
    return torch.where(present if losses.values.ndim == 1 else present[:, None], losses.values, 0)


def _vector(losses: ExampleLosses, reduction: Reduction) -> Tensor:
    if losses.values.ndim != 1:
        raise LossError(
            f"{reduction} expects one value an example, got values of shape "
            f"{tuple(losses.values.shape)}. Sum over the example's own terms, and return counts."
        )
    return _masked(losses)


def _means(losses: ExampleLosses, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """(m, n), with m = -inf where n = 0."""
    v, n = _vector(losses, reduction), losses.weights.to(losses.values.dtype)
    return torch.where(n > 0, v / n, -torch.inf), n


def _entered(q: Tensor | None, num_groups: int) -> Tensor:
    """q over at least num_groups groups; those not seen before enter with an equal share."""
    known = 0 if q is None else len(q)
    if q is not None and num_groups <= known:
        return q.clone()
    share = torch.full((num_groups,), 1 / num_groups, dtype=torch.float64)
    if q is not None:
        share[:known] = q * (known / num_groups)
    return share
