"""What a run minimises, as a function of a whole batch.

    L(w) = sum over terms R(v_1(w) .. v_B(w)) + Omega(w)

v_i what the model yields for example i, R the reduction, Omega the penalty.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.batch import ExampleLosses, is_count
from anybatch.errors import BatchError, LayoutError, LossError
from anybatch.penalties import Penalties, Penalty
from anybatch.pytree import name_leaves
from anybatch.reductions import Mean, Reduced, Reduction, as_reduction

__all__ = ["DATA", "Losses", "Objective"]

DATA = "data"
"""Name of the term of an objective that has only one."""

type_of_losses = Tensor | ExampleLosses | Mapping[str, Tensor | ExampleLosses]
Losses = dict[str, ExampleLosses]


@dataclass(frozen=True)
class Objective:
    """Example losses, a reduction for each term, a penalty, and the grain.

    Args:
        example_losses: `(model, batch) -> Tensor [B]`, `ExampleLosses`, or a dict of these by
            term; one loss per example, nothing averaged over the batch.
        reduction: a `Reduction` or a function of `ExampleLosses`; a dict of these where
            `example_losses` returns one.
        penalty: `L2(a)`, `L1(a)` or a sum of them, added once an update.
        grain: examples that share one draw of the model's random numbers and one set of
            batch-norm statistics; None: the whole batch. Models that neither draw nor couple
            examples do not depend on it.

    Raises:
        LossError, LayoutError: what is neither of these, or names that clash.
    """

    example_losses: Callable[[nn.Module, Any], type_of_losses]
    reduction: (
        Reduction
        | Callable[[ExampleLosses], Tensor]
        | Mapping[str, Reduction | Callable[[ExampleLosses], Tensor]]
    ) = Mean()  # noqa: RUF009  frozen
    penalty: Penalty | Penalties | None = None
    grain: int | None = None

    def __post_init__(self) -> None:
        _check_function(self.example_losses)
        if self.grain is not None and not is_count(self.grain):
            raise LayoutError(
                f"expected grain to be None or a number of examples of at least 1, "
                f"got {self.grain!r}."
            )
        names = set(self.reductions)
        if not names:
            raise LossError("expected a reduction for at least one term, got an empty dict.")
        if not isinstance(self.penalty, Penalty | Penalties | None):
            raise LossError(
                f"expected a penalty such as ab.L2(5e-4), several added with +, or None, "
                f"got {self.penalty!r}."
            )
        clash = [term.part for term in self.penalty or () if term.part in names]
        if clash:
            raise LossError(
                f"a term and a penalty are both called {clash[0]!r}, expected one name each: "
                f"rename the term, or give the penalty name=..."
            )

    @cached_property
    def reductions(self) -> dict[str, Reduction]:
        """Reduction of each term by name."""
        if isinstance(self.reduction, Mapping):
            return {name: as_reduction(given) for name, given in self.reduction.items()}
        return {DATA: as_reduction(self.reduction)}

    def losses(self, model: nn.Module, batch: Any, num_examples: int) -> Losses:
        """Losses of each term for a micro-batch, checked; values in at least float32.

        Raises:
            LossError: a shape, type or name other than declared.
        """
        return self.checked(self.call(model, batch), num_examples)

    def call(self, model: nn.Module, batch: Any) -> type_of_losses:
        """Call `example_losses`.

        Raises:
            BatchError: types of the batch and the weights that torch does not mix.
        """
        try:
            return self.example_losses(model, batch)
        except RuntimeError as error:
            if re.search(r"dtype|scalar type|[Ii]nput type", str(error)) is None:
                raise
            raise BatchError(
                f"example_losses failed on types that do not fit: {error}. {_types(model, batch)} "
                f"Convert the batch, such as by x.float(), or the model, by model.double()."
            ) from error

    def checked(self, returned: type_of_losses, num_examples: int) -> Losses:
        """What `example_losses` has returned for a micro-batch, by term; raises as `losses`."""
        terms = returned if isinstance(returned, Mapping) else {DATA: returned}
        reductions = self.reductions
        if set(terms) != set(reductions):
            raise LossError(
                f"example_losses returned {_named(returned)}, but the objective has "
                f"{_named(self.reduction)}. Give each term its reduction by name: "
                f'reduction={{"tokens": ab.Mean(), ...}} for a dict {{"tokens": losses, ...}}.'
            )
        return {
            name: _checked(name, terms[name], num_examples, vectors=reduction.takes_vectors)
            for name, reduction in reductions.items()
        }

    def reduce(
        self, losses: Losses, states: Mapping[str, Tensor | None] | None = None
    ) -> dict[str, Reduced]:
        """Reduce each term of a whole batch; see `Reduction.reduce`."""
        states = states or {}
        return {
            name: reduction.reduce(losses[name], states.get(name))
            for name, reduction in self.reductions.items()
        }


def _types(model: nn.Module, batch: Any) -> str:
    """List the types of a batch and of the weights, for the message."""
    tensors = [(path, leaf) for path, leaf in name_leaves(batch) if isinstance(leaf, Tensor)]
    held = ", ".join(f"{path} is {leaf.dtype}" for path, leaf in tensors[:6])
    weights = " and ".join(sorted({str(p.dtype) for p in model.parameters()}))
    return f"{held or 'The batch holds no tensor'}; the weights are {weights or 'none'}."


def _check_function(example_losses: object) -> None:
    """Refuse what cannot be called, and a loss of torch, which takes no model."""
    is_module = isinstance(example_losses, nn.Module)
    if not callable(example_losses) or (is_module and not _takes_two(example_losses)):
        raise LossError(
            f"example_losses is {example_losses!r}. It must be a function of (model, batch) that "
            f"returns one loss per example, such as lambda model, batch: "
            f"F.cross_entropy(model(batch[0]), batch[1], reduction='none')."
        )


def _takes_two(module: Any) -> bool:
    """Whether a module of the user's own may be called with a model and a batch."""
    if isinstance(module, nn.modules.loss._Loss):
        return False  # takes outputs and targets
    try:
        signature(module.forward).bind(None, None)
    except TypeError:
        return False
    return True


def _named(given: object) -> str:
    """Names of the terms of what is given, for the message."""
    return f"the terms {sorted(map(str, given))}" if isinstance(given, Mapping) else "one, unnamed"


def _checked(
    name: str, given: Tensor | ExampleLosses, num_examples: int, *, vectors: bool
) -> ExampleLosses:
    losses = given if isinstance(given, ExampleLosses) else ExampleLosses(given)
    values = losses.values
    if not isinstance(values, Tensor):
        raise LossError(
            f"example_losses returned a {type(values).__name__} for the term {name!r}, "
            f"expected a tensor of one loss per example."
        )
    if values.layout != torch.strided or values.is_nested:
        raise LossError(
            f"example_losses returned a tensor of the layout {values.layout} for the term "
            f"{name!r}. It must be a dense tensor of one loss per example."
        )
    if values.ndim not in ((1, 2) if vectors else (1,)) or values.shape[0] != num_examples:
        advice = (
            "Use reduction='none' in the loss, and sum the terms of one example (tokens, pixels) "
            "and return counts."
        )
        if values.ndim == 0 and num_examples == 1:
            advice += (
                " In a micro-batch of one example squeeze() removes the examples' dimension too: "
                "write squeeze(-1), or [:, 0]."
            )
        raise LossError(
            f"example_losses returned shape {tuple(values.shape)} for a batch of {num_examples} "
            f"examples, expected ({num_examples},): one loss per example. {advice}"
        )
    if not values.is_floating_point():
        raise LossError(
            f"example_losses returned {values.dtype} for the term {name!r}, expected "
            f"floating-point values: a loss that is differentiated, not a count of errors."
        )
    if losses.counts is not None or losses.groups is not None or losses.metrics:
        _check_companions(name, losses, num_examples)
        return losses.map(_widen)
    return losses if values.dtype.itemsize >= 4 else replace(losses, values=values.float())


def _widen(tensor: Tensor) -> Tensor:
    """Convert to at least float32: sums over a batch leave the range and the digits of float16."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _check_companions(name: str, losses: ExampleLosses, num_examples: int) -> None:
    """Counts, groups and metrics are one an example."""
    if not isinstance(losses.metrics, Mapping):
        raise LossError(
            f"metrics of the term {name!r} are of type {type(losses.metrics).__name__}. They must "
            f"be a dict of tensors of shape ({num_examples},) by name."
        )
    given: dict[str, object] = {"counts": losses.counts, "groups": losses.groups}
    given |= {f"the metric {metric!r}": tensor for metric, tensor in losses.metrics.items()}
    for what, tensor in given.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if shape != (num_examples,):
            came = type(tensor).__name__ if shape is None else f"a tensor of shape {shape}"
            raise LossError(
                f"{what} of the term {name!r}: expected a tensor of shape ({num_examples},), "
                f"one an example, got {came}."
            )
    if losses.counts is not None and (losses.counts.is_complex() or losses.counts.requires_grad):
        came = "complex" if losses.counts.is_complex() else "part of the graph"
        raise LossError(
            f"counts of the term {name!r} are {came}. They must be real numbers that do not depend "
            f"on the weights: the reduction differentiates the values alone. Multiply the values "
            f"by what is learned, or detach() the counts."
        )
