"""Objective of an update, as a function of a whole batch.

    L(w) = sum over terms R(v_1(w) .. v_B(w)) + Omega(w)

v_i the value of example i under the model, R the reduction, Omega the penalty.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.batch import is_count
from anybatch.errors import BatchError, DivergenceError, LayoutError, LossError
from anybatch.example_losses import ExampleLosses, Losses
from anybatch.penalties import Penalties, Penalty
from anybatch.pytree import name_leaves
from anybatch.reductions import Mean, Reduced, Reduction, as_reduction

__all__ = ["DATA", "Losses", "Objective", "check_finite"]

DATA = "data"
"""Name of the term of an objective that has only one."""

LossesOrTensors = Tensor | ExampleLosses | Mapping[str, Tensor | ExampleLosses]


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
        LossError, LayoutError: arguments of another kind, or names that clash.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> def example_losses(model, batch):
        ...     inputs, targets = batch
        ...     return cross_entropy(model(inputs), targets, reduction="none")
        >>> objective = Objective(example_losses, reduction=Mean(), grain=32)
        >>> batch = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> objective.losses(nn.Linear(3, 2), batch, num_examples=2)[DATA].values.shape
        torch.Size([2])
    """

    example_losses: Callable[[nn.Module, Any], LossesOrTensors]
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
                f"grain is {self.grain!r}. It must be None or a number of examples of at least 1."
            )
        names = set(self.reductions)
        if not names:
            raise LossError("reduction is an empty dict. Give at least one term a reduction.")
        if not isinstance(self.penalty, Penalty | Penalties | None):
            raise LossError(
                f"penalty is {self.penalty!r}. It must be a penalty such as ab.L2(5e-4), several "
                f"added with +, or None."
            )
        clash = [term.part for term in self.penalty or () if term.part in names]
        if clash:
            raise LossError(
                f"A term and a penalty are both called {clash[0]!r}. Each needs its own name. "
                f"Rename the term, or give the penalty name=..."
            )

    @cached_property
    def reductions(self) -> dict[str, Reduction]:
        """Reduction of each term by name."""
        if isinstance(self.reduction, Mapping):
            return {name: as_reduction(reduction) for name, reduction in self.reduction.items()}
        return {DATA: as_reduction(self.reduction)}

    @cached_property
    def linear_reduction(self) -> Reduction | None:
        """Reduction, if it is the only one and linear in the values; None otherwise."""
        reductions = list(self.reductions.values())
        is_linear = len(reductions) == 1 and reductions[0].factor(1.0, 1) is not None
        return reductions[0] if is_linear else None

    def losses(self, model: nn.Module, batch: Any, num_examples: int) -> Losses:
        """Compute and check the losses of each term for a micro-batch, in at least float32.

        Raises:
            LossError: a shape, type or name other than declared.
        """
        return self.check(self.call(model, batch), num_examples)

    def call(self, model: nn.Module, batch: Any) -> LossesOrTensors:
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
                f"example_losses failed on types that do not fit: {error}. "
                f"{_list_types(model, batch)} "
                f"Convert the batch, such as by x.float(), or the model, by model.double()."
            ) from error

    def check(self, returned: LossesOrTensors, num_examples: int) -> Losses:
        """Check what `example_losses` returned for a micro-batch; return it by term."""
        is_single = isinstance(returned, Tensor) or not isinstance(returned, Mapping)
        terms: Any = {DATA: returned} if is_single else returned
        reductions = self.reductions
        if terms.keys() != reductions.keys():
            raise LossError(
                f"example_losses returned {_list_terms(returned)}, but the objective has "
                f"{_list_terms(self.reduction)}. Give each term its reduction by name: "
                f'reduction={{"tokens": ab.Mean(), ...}} for a dict {{"tokens": losses, ...}}.'
            )
        losses = {}
        for name, reduction in reductions.items():
            losses[name] = _check_losses(name, terms[name], num_examples, reduction)
        return losses

    def reduce(
        self, losses: Losses, states: Mapping[str, Tensor | None] | None = None
    ) -> dict[str, Reduced]:
        """Reduce each term of a whole batch; see `Reduction.reduce`."""
        states, results = states or {}, {}
        for name, reduction in self.reductions.items():
            results[name] = reduction.reduce(losses[name], states.get(name))
        return results


def check_finite(
    name: str, losses: ExampleLosses, reduced: Reduced, ids: Sequence[Tensor | None]
) -> None:
    """Refuse a term of the loss that gives no finite gradient.

    A loss that is not finite and has c_i = 0 leaves R finite, but not the gradient: in
    c_i * grad v_i the derivative is not finite either, and 0 * nan is nan.

    Args:
        ids: of the examples, by rank; None: not known.

    Raises:
        DivergenceError: R is not finite.
        LossError: a loss is not finite, and its coefficient is 0.
    """
    value = reduced.value.item()
    if math.isfinite(value) and math.isfinite(losses.values.sum().item()):
        return
    finite = torch.isfinite(losses.values)
    if not math.isfinite(value):
        bad = ~_for_all(finite)
        cause = "Each example's loss is finite: the reduction overflows."
        if bad.any():
            cause = f"Not finite for {_list_examples(bad, ids)}."
        raise DivergenceError(
            f"The term {name!r} of the loss is {value}. It must be a finite number. {cause} Look "
            f"at these examples for NaN, or lower the learning rate."
        )
    uncounted = ~_for_all(finite) & _for_all(reduced.coefficients == 0)
    if uncounted.any():
        raise LossError(
            f"The term {name!r} of the loss is not finite for {_list_examples(uncounted, ids)}. "
            f"Their coefficient is 0, as with a count of 0, but 0 * nan is nan: they would spoil "
            f"the gradient. Keep the loss finite where nothing counts: divide by "
            f"count.clamp(min=1), or replace inputs by torch.where before log or sqrt, not after."
        )


def _for_all(flags: Tensor) -> Tensor:
    """Return [B]: whether all flags of an example are set."""
    return flags if flags.ndim == 1 else flags.all(1)


def _list_examples(mask: Tensor, ids: Sequence[Tensor | None]) -> str:
    """List the examples of a mask, by id if all ids are known."""
    places = mask.nonzero()[:, 0].cpu()
    known_ids = [rank_ids.cpu() for rank_ids in ids if rank_ids is not None]
    has_ids = len(known_ids) == len(ids)
    labels = torch.cat(known_ids)[places] if has_ids else places
    numbers = ", ".join(str(int(i)) for i in labels[:8]) + (", ..." if len(labels) > 8 else "")
    kind = "id" if has_ids else "place in the batch"
    return f"{len(places)} of {len(mask)} examples, by {kind}: {numbers}"


def _list_types(model: nn.Module, batch: Any) -> str:
    """List the types of a batch and of the weights, for the message."""
    tensors = [(path, leaf) for path, leaf in name_leaves(batch) if isinstance(leaf, Tensor)]
    leaves = ", ".join(f"{path} is {leaf.dtype}" for path, leaf in tensors[:6])
    weights = " and ".join(sorted({str(p.dtype) for p in model.parameters()}))
    return f"{leaves or 'The batch holds no tensor'}; the weights are {weights or 'none'}."


def _check_function(example_losses: object) -> None:
    """Refuse an object that cannot be called, and a loss of torch, which takes no model."""
    is_module = isinstance(example_losses, nn.Module)
    if not callable(example_losses) or (is_module and not _takes_two(example_losses)):
        raise LossError(
            f"example_losses is {example_losses!r}. It must be a function of (model, batch) that "
            f"returns one loss per example, such as lambda model, batch: "
            f"F.cross_entropy(model(batch[0]), batch[1], reduction='none')."
        )


def _takes_two(module: Any) -> bool:
    """Return whether a module can be called with a model and a batch."""
    if isinstance(module, nn.modules.loss._Loss):
        return False  # it takes outputs and targets
    try:
        signature(module.forward).bind(None, None)
    except TypeError:
        return False
    return True


def _list_terms(terms: object) -> str:
    """List the names of terms, for the message."""
    return f"the terms {sorted(map(str, terms))}" if isinstance(terms, Mapping) else "one, unnamed"


def _check_losses(
    name: str, term: Tensor | ExampleLosses, num_examples: int, reduction: Reduction
) -> ExampleLosses:
    """Check the losses of one term, and convert them to at least float32."""
    losses = term if isinstance(term, ExampleLosses) else ExampleLosses(term)
    values = losses.values
    if not isinstance(values, Tensor):
        raise LossError(
            f"example_losses returned a {type(values).__name__} for the term {name!r}. It must "
            f"return a tensor of one loss per example."
        )
    if values.layout != torch.strided or values.is_nested:
        raise LossError(
            f"example_losses returned a tensor of the layout {values.layout} for the term "
            f"{name!r}. It must be a dense tensor of one loss per example."
        )
    is_vector = values.ndim == 2 and reduction.takes_vectors
    if not (values.ndim == 1 or is_vector) or values.shape[0] != num_examples:
        raise _refuse_shape(values, num_examples)
    if not values.is_floating_point():
        raise LossError(
            f"example_losses returned {values.dtype} for the term {name!r}. It must return "
            f"floating-point values: a loss that is differentiated, not a count of errors."
        )
    if losses.outputs:
        _check_outputs(name, losses.outputs, num_examples)
    if losses.counts is not None or losses.groups is not None or losses.metrics:
        _check_companions(name, losses, num_examples)
        return replace(losses.map(_widen), outputs=losses.outputs)
    return losses if values.dtype.itemsize >= 4 else replace(losses, values=values.float())


def _refuse_shape(values: Tensor, num_examples: int) -> LossError:
    advice = (
        "Use reduction='none' in the loss, and sum the terms of one example (tokens, pixels) "
        "and return counts."
    )
    if values.ndim == 0 and num_examples == 1:
        advice += (
            " In a micro-batch of one example squeeze() removes the examples' dimension too: "
            "write squeeze(-1), or [:, 0]."
        )
    return LossError(
        f"example_losses returned shape {tuple(values.shape)} for a batch of {num_examples} "
        f"examples. It must return one loss per example, shape ({num_examples},). {advice}"
    )


def _widen(tensor: Tensor) -> Tensor:
    """Convert to at least float32: sums over a batch exceed the range and digits of float16."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _check_companions(name: str, losses: ExampleLosses, num_examples: int) -> None:
    """Check that counts, groups and metrics have one number per example."""
    if not isinstance(losses.metrics, Mapping):
        raise LossError(
            f"metrics of the term {name!r} are of type {type(losses.metrics).__name__}. They must "
            f"be a dict of tensors of shape ({num_examples},) by name."
        )
    companions: dict[str, object] = {"counts": losses.counts, "groups": losses.groups}
    companions |= {f"the metric {metric!r}": values for metric, values in losses.metrics.items()}
    for kind, tensor in companions.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if shape != (num_examples,):
            value = type(tensor).__name__ if shape is None else f"a tensor of shape {shape}"
            raise LossError(
                f"{kind} of the term {name!r}: example_losses returned {value}. It must be a "
                f"tensor of shape ({num_examples},), one number per example."
            )
    if losses.counts is not None and (losses.counts.is_complex() or losses.counts.requires_grad):
        problem = "complex" if losses.counts.is_complex() else "part of the graph"
        raise LossError(
            f"counts of the term {name!r} are {problem}. They must be real numbers that do not "
            f"depend on the weights: the reduction differentiates the values alone. Multiply the "
            f"values by what is learned, or detach() the counts."
        )


def _check_outputs(name: str, outputs: Any, num_examples: int) -> None:
    """Check that outputs are tensors with the examples first."""
    if not isinstance(outputs, Mapping):
        raise LossError(
            f"outputs of the term {name!r} are of type {type(outputs).__name__}. They must be a "
            f"dict of tensors by name."
        )
    for output, tensor in outputs.items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if not shape or shape[0] != num_examples:
            value = type(tensor).__name__ if shape is None else f"a tensor of shape {shape}"
            raise LossError(
                f"The output {output!r} of the term {name!r} is {value}. It must be a tensor "
                f"with the {num_examples} examples as its first dimension: a hidden state of shape "
                f"(layers, B, H) becomes one by transpose(0, 1)."
            )
