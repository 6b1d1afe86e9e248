"""Reductions: from the values of a whole batch to one scalar, and each example's coefficient.

    R(v_1 .. v_B),    c_i = dR/dv_i

    v_i value, n_i count, m_i = v_i / n_i, B the number of examples with n_i > 0.
    The others are treated as absent, and c_i = 0. If all n_i are 0 there is nothing to reduce.

A reduction is pure: `reduce(losses, state)` returns the value, the coefficients and the next
state, which the training loop commits once the update has been made. The linear ones, `Mean` and
`Sum`, are in `reduction`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import isbuiltin
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from anybatch.batch import is_number
from anybatch.errors import LossError
from anybatch.example_losses import ExampleLosses
from anybatch.reduction import Mean, Reduced, Reduction, Scaled, Sum

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


@final
@dataclass(frozen=True)
class Max(Reduction):
    """max m_i; ties share equally. Its objective changes with the batch size.

    Example:
        >>> Max().reduce(ExampleLosses(torch.tensor([1.0, 3.0, 3.0]))).coefficients
        tensor([0.0000, 0.5000, 0.5000])
    """

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        m, n = losses.means, losses.weights.to(losses.values.dtype)
        ties = m == m.max()
        return Reduced(m.max(), ties / (n * ties.sum()))


@final
@dataclass(frozen=True)
class TopFraction(Reduction):
    """Mean of the fraction q of the largest m_i. Its objective changes with the batch size.

    With k = max(qB, 1): the floor(k) largest m, plus (k - floor(k)) of the next, over k.
    Ties at the cut share the rest equally.

    Source: average top-k, Fan et al. 2017, 1705.08826; CVaR, Rockafellar and Uryasev 2000.

    Example:
        >>> losses = ExampleLosses(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> TopFraction(0.5).reduce(losses).value
        tensor(3.5000)
    """

    q: float

    def __post_init__(self) -> None:
        if not (is_number(self.q) and 0 < self.q <= 1):
            raise LossError(f"TopFraction has q={self.q!r}. It must be a fraction, 0 < q <= 1.")

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

    Example:
        >>> losses = ExampleLosses(torch.tensor([1.0, 2.0]))
        >>> round(Tilted(1.0).reduce(losses).value.item(), 4)
        1.6201
    """

    t: float

    def __post_init__(self) -> None:
        if not is_number(self.t) or self.t == 0 or not abs(self.t) < math.inf:
            raise LossError(
                f"Tilted has t={self.t!r}. It must be finite and not 0. For t = 0 use Mean."
            )

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        # Subtract the largest t m so that no exp overflows. log1p and expm1 keep the digits that
        # a small t would cancel.
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

    The state is q, a distribution over the groups of all batches so far. A step first tilts it
    towards the groups with the larger loss, q_g ~ q_g exp(eta L_g), then weights the losses with
    the new q. Groups that are absent from a batch keep their q. A new group enters with an equal
    share, 1 / (number of groups).

    Source: Sagawa et al. 2020, 1911.08731, algorithm 1.

    Example:
        >>> losses = ExampleLosses(torch.tensor([1.0, 3.0]), groups=torch.tensor([0, 1]))
        >>> value, coefficients, q = GroupDRO(eta=1.0).reduce(losses)
        >>> [round(weight, 4) for weight in q.tolist()]
        [0.1192, 0.8808]
    """

    eta: float

    def __post_init__(self) -> None:
        if not (is_number(self.eta) and 0 <= self.eta < math.inf):
            raise LossError(f"GroupDRO has eta={self.eta!r}. It must be finite and at least 0.")

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        group = _get_groups(losses)
        v, n = losses.values.double(), losses.weights.double()
        if not isinstance(state, Tensor | None) or (state is not None and state.ndim != 1):
            raise LossError(
                f"The state of GroupDRO is {state!r}. It must be None or what the last update "
                f"returned, a tensor of one weight for each group."
            )
        num_groups = max(int(group.max()) + 1, 0 if state is None else len(state))
        count = v.new_zeros(num_groups).index_add(0, group, n)
        present = count > 0
        loss = torch.zeros_like(count).index_add(0, group, v)[present] / count[present]
        q = _add_new_groups(state, present)
        tilted = (q[present].log() + self.eta * loss).softmax(0) * q[present].sum()
        q[present] = tilted.clamp(min=torch.finfo(q.dtype).tiny)  # 0 means not in any batch yet
        value, c = (q[present] * loss).sum(), (q / count)[group]
        return Reduced(value.to(losses.values.dtype), c.to(losses.values.dtype), q.cpu())


@final
@dataclass(frozen=True)
class Function(Reduction):
    """Any function from `ExampleLosses` to a scalar; coefficients by autograd on the values.

    Values may be [B, k], embeddings for instance, and the function may couple examples.

    Example:
        >>> rms = Function(lambda losses: losses.values.square().mean().sqrt())
        >>> rms.reduce(ExampleLosses(torch.tensor([3.0, 4.0]))).coefficients
        tensor([0.4243, 0.5657])
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
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"The reduction {self.function!r} returned {kind}. It must return a 0-d tensor: "
                f"one number for the values of the whole batch."
            )
        if not value.requires_grad:
            return Reduced(value, torch.zeros_like(values))
        _check_leaves(value, values)
        (c,) = torch.autograd.grad(value, values)
        return Reduced(value.detach(), c)


def as_reduction(reduction: object) -> Reduction:
    """Return a reduction unchanged, and wrap a function as one.

    Raises:
        LossError: anything else, such as a string, or a class in place of its instance.
    """
    if isinstance(reduction, Reduction):
        return reduction
    if isbuiltin(reduction):
        raise LossError(
            f"{reduction!r} takes a tensor, and a reduction receives ab.ExampleLosses. Use a "
            f"reduction such as ab.Mean(), or lambda losses: losses.values.mean()."
        )
    if isinstance(reduction, type):
        name = reduction.__name__
        raise LossError(f"The reduction is the class {name}. Write {name}(...), with parentheses.")
    if callable(reduction):
        return Function(reduction)
    raise LossError(
        f"The reduction is {reduction!r}. It must be a reduction such as ab.Mean(), or a function "
        f"of ab.ExampleLosses."
    )


def _check_leaves(value: Tensor, values: Tensor) -> None:
    """Refuse a trainable tensor other than the values: an update has no gradient for it."""
    visited, waiting = set(), [get_gradient_edge(value).node]
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not values:
            raise LossError(
                f"The reduction depends on a trainable tensor of shape {tuple(leaf.shape)} besides "
                f"the values, which would get no gradient from it. Use that tensor in "
                f"example_losses (scale the embeddings by a temperature there, say)."
            )
        visited.add(node)
        waiting += [n for n, _ in node.next_functions if n is not None and n not in visited]


def _get_groups(losses: ExampleLosses) -> Tensor:
    group = losses.groups
    if group is None or group.is_floating_point() or group.is_complex():
        kind = "no groups" if group is None else f"groups of {group.dtype}"
        raise LossError(
            f"GroupDRO received {kind}. Return ExampleLosses(values, groups=[B] of integers)."
        )
    if int(group.min()) < 0:
        raise LossError(f"GroupDRO received the group {int(group.min())}. Groups count from 0.")
    return group.long()


def _add_new_groups(state: Tensor | None, present: Tensor) -> Tensor:
    """Return a copy of q over all groups, in which new ones have an equal share."""
    q = torch.zeros(len(present), dtype=torch.float64, device=present.device)
    if state is not None:
        q[: len(state)] = state.to(q.device)
    is_old = q > 0
    is_new = present & ~is_old
    num_old, num_new = int(is_old.sum()), int(is_new.sum())
    num_groups = num_old + num_new
    return torch.where(is_new, 1 / num_groups, q * (num_old / num_groups))
