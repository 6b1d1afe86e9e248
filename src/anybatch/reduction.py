"""Reduction of a whole batch to one scalar, with the coefficient of each example.

    R(v_1 .. v_B),    c_i = dR/dv_i

    v_i value, n_i count, B the number of examples. Those with n_i = 0 have c_i = 0.

This file holds the linear reductions, `Mean` and `Sum`, which need one pass over a cut batch.
`reductions` holds the others, which need two.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, final

import torch
from torch import Tensor

from anybatch.batch import is_number
from anybatch.errors import LossError
from anybatch.example_losses import ExampleLosses

__all__ = ["Mean", "Reduced", "Reduction", "Scaled", "Sum"]


class Reduced(NamedTuple):
    """Result of a reduction for a whole batch."""

    value: Tensor  # 0-d, R
    coefficients: Tensor  # shaped like the values, dR/dv
    state: Tensor | None = None  # for the next step; None: the reduction has no state


class Reduction(ABC):
    """A differentiable function of the values of a batch to a scalar."""

    @property
    def takes_vectors(self) -> bool:
        """Return whether values may be [B, k], k numbers per example, and not only [B]."""
        return False

    @property
    def needs_counts(self) -> bool:
        """Return whether R is undefined for a batch in which all counts are 0."""
        return True

    def factor(self, total_count: float, num_examples: int) -> float | None:
        """Compute c_i if R is linear in the values; None if it is not.

        Args:
            total_count: the sum of counts over the batch.
            num_examples: of the batch, those with a count of 0 included.
        """
        return None

    @abstractmethod
    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        """Reduce examples that all take part, n_i > 0, where R is not linear."""

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
        values, counts = losses.values, losses.counts
        if values.ndim != 1 and not self.takes_vectors:
            raise LossError(
                f"{self} received values of shape {tuple(values.shape)}. It takes one value per "
                f"example. Sum over the example's own terms, and return counts."
            )
        num_examples = values.shape[0]
        if num_examples == 0:
            raise LossError("The batch is empty. A reduction needs at least one example.")
        if counts is None:
            total: float = num_examples
        else:
            present = losses.present
            _check_counts(counts, present, is_needed=self.needs_counts)
            losses = losses.map(lambda tensor: tensor[present])
            total = losses.weights.double().sum().item()
        c = self.factor(total, num_examples)
        if c is None:
            result = self._reduce(losses, state)
        else:
            result = Reduced(losses.values.sum() * c, torch.full_like(losses.values, c))
        if counts is None:
            return result
        coefficients = torch.zeros_like(values)
        coefficients[present] = result.coefficients
        return result._replace(coefficients=coefficients)

    def __mul__(self, factor: float) -> "Scaled":
        return Scaled(factor, self)

    __rmul__ = __mul__

    def __add__(self, other: object) -> NoReturn:
        raise LossError(
            f"{self} + {other!r} is no reduction. Return each term of the loss by name, and give "
            f'each its own: reduction={{"a": ab.Mean(), "b": 0.1 * ab.Max()}}.'
        )

    __radd__ = __add__


@final
@dataclass(frozen=True)
class Scaled(Reduction):
    """scale * R.

    Example:
        >>> losses = ExampleLosses(torch.tensor([1.0, 3.0]))
        >>> (0.5 * Mean()).reduce(losses).value
        tensor(1.)
    """

    scale: float
    reduction: Reduction

    def __post_init__(self) -> None:
        if not (is_number(self.scale) and math.isfinite(self.scale)):
            raise LossError(
                f"{self.reduction} is multiplied by {self.scale!r}. The factor must be a finite "
                f"number."
            )
        object.__setattr__(self, "scale", float(self.scale))

    @property
    def takes_vectors(self) -> bool:
        return self.reduction.takes_vectors

    @property
    def needs_counts(self) -> bool:
        return self.reduction.needs_counts

    def factor(self, total_count: float, num_examples: int) -> float | None:
        factor = self.reduction.factor(total_count, num_examples)
        return None if factor is None else self.scale * factor

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        value, c, state = self.reduction._reduce(losses, state)
        return Reduced(self.scale * value, self.scale * c, state)


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
    batch by itself. If weights differ between examples, their effect fades in small batches: with
    one example n cancels, and each example counts the same. With W the mean over batches is that
    of all data, sum v / sum n, at every batch size. Examples of weight 0 count in B and in W.

    Args:
        total: W; None: each batch is divided by its own sum of counts.

    Raises:
        LossError: a total that is not a finite number above 0.

    Example:
        >>> weights = torch.tensor([1.0, 3.0])
        >>> losses = ExampleLosses(weights * torch.tensor([0.5, 0.1]), counts=weights)
        >>> round(Mean().reduce(losses).value.item(), 4)
        0.2
        >>> round(Mean(total=2.5).reduce(losses).value.item(), 4)
        0.16
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
    """sum v: B times the mean if all counts are 1.

    Example:
        >>> Sum().reduce(ExampleLosses(torch.tensor([1.0, 3.0]))).value
        tensor(4.)
    """

    def factor(self, total_count: float, num_examples: int) -> float:
        return 1.0


def _check_counts(counts: Tensor, present: Tensor, *, is_needed: bool) -> None:
    wrong = (~((counts >= 0) & counts.isfinite())).nonzero()
    if len(wrong):
        raise LossError(
            f"The count (or weight) of example {wrong[0, 0].item()} of the batch is "
            f"{counts[wrong[0, 0]].item()}. It must be finite and at least 0: a weight below 0 "
            f"has no mean."
        )
    if is_needed and not present.any():
        raise LossError(
            "All counts of the batch are 0. At least one example must take part. Is every token "
            "masked, or every sample weight 0?"
        )
