"""Reduction of a whole batch to one scalar, with the coefficient of each example.

R(v_1 .. v_B),    c_i = dR/dv_i

v_i value, n_i count, B the number of examples. Those with n_i = 0 have c_i = 0.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, final

import torch
from torch import Tensor

from anybatch.batch import ExampleLosses, is_number
from anybatch.errors import LossError

__all__ = ["Reduced", "Reduction", "Scaled"]


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

    @property
    def needs_counts(self) -> bool:
        """Whether R is undefined for a batch in which all counts are 0."""
        return True

    def factor(self, total_count: float, num_examples: int) -> float | None:
        """Compute c_i where R is linear in the values; None where it is not.

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
        if losses.values.ndim != 1 and not self.takes_vectors:
            came = tuple(losses.values.shape)
            raise LossError(
                f"{self} expects one value an example, got values of shape {came}. "
                f"Sum over the example's own terms, and return counts."
            )
        if losses.values.shape[0] == 0:
            raise LossError("expected at least one example in the batch, got none.")
        if losses.counts is None:
            return self._of_present(losses, state, len(losses.values))
        present = losses.present
        _check_counts(losses.counts, present, is_needed=self.needs_counts)
        own, num_examples = losses.map(lambda tensor: tensor[present]), len(present)
        value, c, state = self._of_present(own, state, num_examples)
        coefficients = torch.zeros_like(losses.values)
        coefficients[present] = c
        return Reduced(value, coefficients, state)

    def _of_present(
        self, losses: ExampleLosses, state: Tensor | None, num_examples: int
    ) -> Reduced:
        """Reduce the examples that take part, of so many in the batch."""
        v = losses.values
        total = len(v) if losses.counts is None else losses.counts.double().sum().item()
        c = self.factor(total, num_examples)
        if c is None:
            return self._reduce(losses, state)
        return Reduced(v.sum() * c, torch.full_like(v, c))

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

    @property
    def needs_counts(self) -> bool:
        return self.reduction.needs_counts

    def factor(self, total_count: float, num_examples: int) -> float | None:
        inner = self.reduction.factor(total_count, num_examples)
        return None if inner is None else self.scale * inner

    def _reduce(self, losses: ExampleLosses, state: Tensor | None) -> Reduced:
        value, c, state = self.reduction._reduce(losses, state)
        return Reduced(self.scale * value, self.scale * c, state)


def _check_counts(counts: Tensor, present: Tensor, *, is_needed: bool) -> None:
    wrong = (~((counts >= 0) & counts.isfinite())).nonzero()
    if len(wrong):
        raise LossError(
            f"expected finite counts (or weights) of at least 0, got {counts[wrong[0, 0]].item()} "
            f"for example {wrong[0, 0].item()} of the batch. A weight below 0 has no mean."
        )
    if is_needed and not present.any():
        raise LossError(
            "all counts of the batch are 0, expected at least one example that takes part. "
            "Is every token masked, or every sample weight 0?"
        )
