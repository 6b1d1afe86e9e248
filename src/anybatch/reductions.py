"""Reductions: from the values of a whole batch to one scalar, and each example's coefficient.

    R(v_1 .. v_B),    c_i = dR/dv_i

    v_i value, n_i count, m_i = v_i / n_i, B the number of examples with n_i > 0.
    The others are as if absent, and c_i = 0. Where all n_i are 0 there is nothing to reduce.

A reduction is pure: `reduce(losses, state)` returns the value, the coefficients and the next
state, which the training loop commits once the update has been made.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import isbuiltin
from typing import NamedTuple, NoReturn, final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from anybatch.batch import ExampleLosses, is_number
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

    @property
    def takes_vectors(self) -> bool:
        """Whether values may be [B, k]: k numbers an example, and not only one."""
        return False

    def factor(self, total_count: float) -> float | None:
        """c_i where R is linear in the values, given the sum of counts; None where it is not."""
        return None

    @abstractmethod
    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        """R of examples that all take part: n_i > 0."""

    def reduce(self, losses: ExampleLosses, state: Tensor | None = None) -> Reduced:
        """Reduce the values of a whole batch.

        Args:
            losses: values [B] or [B, k], counts [B], groups [B], without a graph.
            state: what this reduction returned at the last step, None at the first.

        Returns:
            R, dR/dv exact to rounding, and the next state.

        Raises:
            LossError: counts below 0 or not finite, all counts 0, or a shape that R cannot take.
        """
        if losses.values.ndim != 1 and not self.takes_vectors:
            came = tuple(losses.values.shape)
            raise LossError(
                f"{self} expects one value an example, got values of shape {came}. "
                f"Sum over the example's own terms, and return counts."
            )
        if losses.values.shape[0] == 0:
            raise LossError("expected at least one example in the batch, got none.")
        if losses.counts is None:
            return self._reduce(losses, state)
        present = losses.present
        _check_counts(losses.counts, present)
        value, c, state = self._reduce(losses.map(lambda tensor: tensor[present]), state)
        coefficients = torch.zeros_like(losses.values)
        coefficients[present] = c
        return Reduced(value, coefficients, state)

    def __mul__(self, factor: float) -> "Scaled":
        return Scaled(factor, self)

    __rmul__ = __mul__

    def __add__(self, other: object) -> NoReturn:
        raise LossError(
            f"{self} + {other!r} is no reduction. Return each term of the loss by name, and give "
            f'each its own: reduction={{"a": ab.Mean(), "b": 0.1 * ab.Max()}}.'
        )

    __radd__ = __add__


class _Linear(Reduction):
    """R = factor * sum v."""

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        v = losses.values
        total = v.shape[0] if losses.counts is None else losses.counts.double().sum().item()
        c = self.factor(total)
        assert c is not None
        return Reduced(v.sum() * c, torch.full_like(v, c))


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
        m, n = losses.means, losses.weights.to(losses.values.dtype)
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
        if not (is_number(self.q) and 0 < self.q <= 1):
            raise LossError(f"TopFraction expects a fraction 0 < q <= 1, got {self.q!r}.")

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        m, n = losses.means, losses.weights.to(losses.values.dtype)
        k = max(round(self.q * len(m), 9), 1.0)  # 0.07 * 100 is 7, not 7.000000000000001
        top = m.sort(descending=True).values[: math.ceil(k)]
        cut = top[-1]
        above, ties = m > cut, m == cut
        share = (k - above.sum().item()) / ties.sum().item() if ties.any() else math.nan
        value = (top[:-1].sum() + (k - len(top) + 1) * cut) / k
        return Reduced(value, (above.to(m.dtype) + share * ties.to(m.dtype)) / (k * n))


@final
@dataclass(frozen=True)
class Tilted(Reduction):
    """(1/t) log((1/B) sum exp(t m_i)): from the mean (t to 0) to the maximum (t to infinity).

    Its objective changes with the batch size. Source: Li et al. 2021, 2007.01162, equation 2.
    """

    t: float

    def __post_init__(self) -> None:
        if not is_number(self.t) or self.t == 0 or not abs(self.t) < math.inf:
            raise LossError(f"Tilted expects a finite t other than 0 (use Mean), got {self.t!r}.")

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        # From the largest t m, so that no exp overflows; log1p and expm1 keep what a small t
        # would cancel.
        m, n = losses.means.double(), losses.weights.double()
        largest = m[(self.t * m).argmax()]
        tilted = self.t * (m - largest)
        value = largest + tilted.expm1().mean().log1p() / self.t
        dtype = losses.values.dtype
        return Reduced(value.to(dtype), (tilted.softmax(0) / n).to(dtype))


@final
@dataclass(frozen=True)
class GroupDRO(Reduction):
    """sum_g q_g L_g,  L_g = (sum of v in g) / n_g,  n_g the sum of counts in g.

    The state is q, a distribution over the groups seen so far. A step first tilts it towards the
    groups with the larger loss, q_g ~ q_g exp(eta L_g), then weighs the losses with the new q.
    Groups absent from a batch keep their q; one seen for the first time enters with an equal
    share, 1 / (number of groups seen).

    Source: Sagawa et al. 2020, 1911.08731, algorithm 1.
    """

    eta: float

    def __post_init__(self) -> None:
        if not (is_number(self.eta) and 0 <= self.eta < math.inf):
            raise LossError(f"GroupDRO expects a finite eta of at least 0, got {self.eta!r}.")

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        group = _groups(losses)
        v, n = losses.values.double(), losses.weights.double()
        if not isinstance(state, Tensor | None) or (state is not None and state.ndim != 1):
            raise LossError(
                f"The state of GroupDRO is {state!r}. It must be None or what the last update "
                f"returned, a tensor of one weight for each group."
            )
        num_groups = max(int(group.max()) + 1, 0 if state is None else len(state))
        count = v.new_zeros(num_groups).index_add(0, group, n)
        here = count > 0
        loss = torch.zeros_like(count).index_add(0, group, v)[here] / count[here]
        q = _entered(state, here)
        tilted = (q[here].log() + self.eta * loss).softmax(0) * q[here].sum()
        q[here] = tilted.clamp(min=torch.finfo(q.dtype).tiny)  # 0 is for groups not seen yet
        value, c = (q[here] * loss).sum(), (q / count)[group]
        return Reduced(value.to(losses.values.dtype), c.to(losses.values.dtype), q.cpu())


@final
@dataclass(frozen=True)
class Function(Reduction):
    """Any function from `ExampleLosses` to a scalar; coefficients by autograd on the values.

    Values may be [B, k], embeddings for instance, and the function may couple examples.
    """

    function: Callable[[ExampleLosses], Tensor]

    @property
    def takes_vectors(self) -> bool:
        return True

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        values = losses.values.detach().requires_grad_()
        with torch.enable_grad():
            value = self.function(replace(losses, values=values))
        if not isinstance(value, Tensor) or value.ndim != 0:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"expected the reduction {self.function!r} to return a 0-d tensor, got {came}. "
                f"It gets the values of the whole batch and makes one number of them."
            )
        if not value.requires_grad:
            return Reduced(value, torch.zeros_like(values))
        _check_leaves(value, values)
        (c,) = torch.autograd.grad(value, values)
        return Reduced(value.detach(), c)


@final
@dataclass(frozen=True)
class Scaled(Reduction):
    """scale * R."""

    scale: float
    reduction: Reduction

    def __post_init__(self) -> None:
        if not (is_number(self.scale) and math.isfinite(self.scale)):
            raise LossError(f"expected a finite factor for {self.reduction}, got {self.scale!r}.")
        object.__setattr__(self, "scale", float(self.scale))

    @property
    def takes_vectors(self) -> bool:
        return self.reduction.takes_vectors

    def factor(self, total_count: float) -> float | None:
        inner = self.reduction.factor(total_count)
        return None if inner is None else self.scale * inner

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        value, c, state = self.reduction._reduce(losses, state)
        return Reduced(self.scale * value, self.scale * c, state)


def as_reduction(given: object) -> Reduction:
    """The reduction itself, or a function wrapped as one.

    Raises:
        LossError: anything else, such as a string, or a class in place of its instance.
    """
    if isinstance(given, Reduction):
        return given
    if isbuiltin(given):
        raise LossError(
            f"{given!r} takes a tensor, and a reduction is given ab.ExampleLosses. Use a reduction "
            f"such as ab.Mean(), or lambda losses: losses.values.mean()."
        )
    if callable(given) and not isinstance(given, type):
        return Function(given)
    expected = "expected a reduction such as ab.Mean(), or a function of ab.ExampleLosses"
    if isinstance(given, type):
        name = given.__name__
        raise LossError(f"{expected}, got the class {name}: write {name}(...), with parentheses.")
    raise LossError(f"{expected}, got {given!r}.")


def _check_counts(counts: Tensor, present: Tensor) -> None:
    wrong = (~((counts >= 0) & counts.isfinite())).nonzero()
    if len(wrong):
        raise LossError(
            f"expected finite counts (or weights) of at least 0, got {counts[wrong[0, 0]].item()} "
            f"for example {wrong[0, 0].item()} of the batch. A weight below 0 has no mean."
        )
    if not present.any():
        raise LossError(
            "all counts of the batch are 0, expected at least one example that takes part. "
            "Is every token masked, or every sample weight 0?"
        )


def _check_leaves(value: Tensor, values: Tensor) -> None:
    """Refuse a trainable tensor besides the values: an update has no gradient for it."""
    seen, waiting = set(), [get_gradient_edge(value).node]
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not values:
            raise LossError(
                f"the reduction depends on a trainable tensor of shape {tuple(leaf.shape)} besides "
                f"the values, which would get no gradient from it. Use that tensor in "
                f"example_losses (scale the embeddings by a temperature there, say)."
            )
        seen.add(node)
        waiting += [n for n, _ in node.next_functions if n is not None and n not in seen]


def _groups(losses: ExampleLosses) -> Tensor:
    group = losses.groups
    if group is None or group.is_floating_point() or group.is_complex():
        came = "no groups" if group is None else f"groups of {group.dtype}"
        raise LossError(
            f"GroupDRO expects ExampleLosses(values, groups=[B] of integers), got {came}."
        )
    if int(group.min()) < 0:
        raise LossError(f"GroupDRO expects groups from 0, got {int(group.min())}.")
    return group.long()


def _entered(state: Tensor | None, here: Tensor) -> Tensor:
    """q over all groups, those in the batch for the first time with an equal share; a copy."""
    q = torch.zeros(len(here), dtype=torch.float64, device=here.device)
    if state is not None:
        q[: len(state)] = state.to(q.device)
    seen = q > 0
    new = here & ~seen
    num_seen, num_new = int(seen.sum()), int(new.sum())
    num_groups = num_seen + num_new
    return torch.where(new, 1 / num_groups, q * (num_seen / num_groups))
