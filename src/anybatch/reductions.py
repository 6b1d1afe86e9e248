"""Reductions: from the values of a whole batch to one scalar, and each example's coefficient.

    R(v_1 .. v_B),    c_i = dR/dv_i

    v_i value, n_i count, m_i = v_i / n_i, B the number of examples with n_i > 0.
    The others are as if absent, and c_i = 0. Where all n_i are 0 there is nothing to reduce.

A reduction is pure: `reduce(losses, state)` returns the value, the coefficients and the next
state, which the training loop commits once the update has been made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import isbuiltin
from typing import NoReturn, final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from anybatch.batch import ExampleLosses, is_number
from anybatch.errors import LossError
from anybatch.reduction import Reduced, Reduction, Scaled

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


class _Linear(Reduction):
    """R = factor * sum v."""

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> NoReturn:
        raise AssertionError("a linear reduction has a factor")


@final
@dataclass(frozen=True)
class Mean(_Linear):
    """sum v / sum n, or with a total W:  sum v / (B W).

    v_i value and n_i count (or weight) of example i, B the number of examples of the batch.
    W = (1/N) sum n_i over all N examples of the data: the mean count.

    Without W this is the plain mean, the token mean and the weighted mean in one formula, of each
    batch by itself. Where weights differ between examples, that fades in small batches: with one
    example n cancels, and each example counts the same. With W the mean over batches is that of
    all data, sum v / sum n, at every batch size. Examples of weight 0 count in B and in W.

    Args:
        total: W; None: each batch is divided by its own sum of counts.

    Example:
        >>> import torch
        >>> weights = torch.tensor([1.0, 3.0])
        >>> losses = ExampleLosses(weights * torch.tensor([0.5, 0.1]), counts=weights)
        >>> round(Mean().reduce(losses).value.item(), 4)
        0.2
        >>> round(Mean(total=2.5).reduce(losses).value.item(), 4)
        0.16

    Raises:
        LossError: a total that is not a finite number above 0.
    """

    total: float | None = None

    def __post_init__(self) -> None:
        if self.total is None:
            return
        if not (is_number(self.total) and 0 < self.total < math.inf):
            raise LossError(
                f"Mean has total={self.total!r}. It must be a finite number above 0: the mean "
                f"count, or weight, over all examples of the data, such as weights.mean().item()."
            )
        object.__setattr__(self, "total", float(self.total))

    @property
    def needs_counts(self) -> bool:
        return self.total is None

    def factor(self, total_count: float, num_examples: int) -> float:
        return 1 / (total_count if self.total is None else num_examples * self.total)

    def __repr__(self) -> str:
        return "Mean()" if self.total is None else f"Mean(total={self.total!r})"


@final
@dataclass(frozen=True)
class Sum(_Linear):
    """sum v: B times the mean where all counts are 1."""

    def factor(self, total_count: float, num_examples: int) -> float:
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
