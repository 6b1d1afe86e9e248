"""Penalties on the weights, added once an update, whatever the batch.

    L2(a): Omega = (a/2) * sum |w|^2,  gradient a * w          (torch's weight_decay)
    L1(a): Omega = a * sum |w|,        gradient a * w / |w|     (0 at w = 0)

Weights may be complex: |w| is then the modulus, and the gradient is in torch's convention,
dOmega/dRe(w) + i dOmega/dIm(w).

Each applies to the trainable parameters whose names match `on`; by default to all but biases and
the parameters of normalisation layers. A parameter with several names (tied) counts once, and any
of its names may match.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import is_
from typing import final

import torch
from torch import Tensor, nn

from anybatch.batch import is_number
from anybatch.compiled import unwrap
from anybatch.errors import ModelError
from anybatch.model_facts import find_record

__all__ = ["L1", "L2", "Penalties", "Penalty", "add_gradients", "add_selected"]
__all__ += ["compute_values", "select_parameters"]

Whole = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Penalty(ABC):
    """One named penalty.

    Args:
        strength: the factor a, at least 0.
        on: patterns of parameter names (`fnmatch`, such as "*.weight"); None: the default rule.
        name: key in `gradient.parts`; None: the kind and the patterns.
    """

    strength: float
    on: str | Sequence[str] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.strength) and 0 <= self.strength < float("inf")):
            raise ModelError(
                f"{type(self).__name__} has strength {self.strength}. It must be finite and at "
                f"least 0: the penalty is added to the loss, which is minimised."
            )
        if self.on is not None:
            object.__setattr__(self, "on", _patterns(self.on))

    @property
    def part(self) -> str:
        """Name of this part of the loss."""
        if self.name is not None:
            return self.name
        kind = type(self).__name__
        return kind if self.on is None else f"{kind}({', '.join(_patterns(self.on))})"

    def __iter__(self) -> Iterator["Penalty"]:
        return iter((self,))

    def __add__(self, other: "Penalty | Penalties") -> "Penalties":
        return Penalties((self, *_terms(other)))

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """Compute Omega of one parameter, a 0-d tensor."""

    @abstractmethod
    def add_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        """Add this penalty's gradient for one parameter to `gradient`, in place."""


@final
@dataclass(frozen=True)
class L2(Penalty):
    """(a/2) * sum |w|^2.

    Example:
        >>> L2(0.1).value(torch.tensor([3.0, 4.0]))
        tensor(1.2500)
    """

    def value(self, weight: Tensor) -> Tensor:
        # The squares of the real and imaginary parts add up to those of the moduli.
        real = torch.view_as_real(weight.resolve_conj()) if weight.is_complex() else weight
        return self.strength / 2 * real.square().sum()

    def add_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        gradient.add_(weight, alpha=self.strength)


@final
@dataclass(frozen=True)
class L1(Penalty):
    """a * sum |w|.

    Example:
        >>> (L2(0.1) + L1(0.01, on="*.weight")).terms
        (L2(strength=0.1, on=None, name=None), L1(strength=0.01, on=('*.weight',), name=None))
    """

    def value(self, weight: Tensor) -> Tensor:
        return self.strength * weight.abs().sum()

    def add_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        gradient.add_(weight.sgn(), alpha=self.strength)


@final
@dataclass(frozen=True)
class Penalties:
    """A sum of penalties, made by adding them.

    Example:
        >>> [term.part for term in L2(0.1) + L1(0.01)]
        ['L2', 'L1']
    """

    terms: tuple[Penalty, ...]

    def __post_init__(self) -> None:
        names = [term.part for term in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise ModelError(
                    f"Two penalties are both called {name!r}. Each needs its own name. Give one "
                    f"of them name=..., or add their strengths."
                )

    def __iter__(self) -> Iterator[Penalty]:
        return iter(self.terms)

    def __add__(self, other: "Penalty | Penalties") -> "Penalties":
        return Penalties((*self.terms, *_terms(other)))


def _terms(penalty: object) -> Iterator[Penalty]:
    if not isinstance(penalty, Penalty | Penalties):
        raise ModelError(
            f"A penalty was added to {penalty!r}. Add penalties alone, such as ab.L2(5e-4) + "
            f"ab.L1(1e-5)."
        )
    return iter(penalty)


def select_parameters(penalty: Penalty, model: nn.Module) -> dict[str, nn.Parameter]:
    """Select the parameters that a penalty applies to, by name.

    Raises:
        ModelError: a pattern that no trainable parameter matches.
    """
    model = unwrap(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if penalty.on is None:
        exempt = _list_exempt(model)
        return {name: p for name, p in trainable.items() if name not in exempt}
    first = {id(p): name for name, p in trainable.items()}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first[id(p)] for name, p in every if id(p) in first}
    selection: set[str] = set()
    for pattern in _patterns(penalty.on):
        matches = {names[name] for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ModelError(
                f"The penalty {penalty.part} is on {pattern!r}, which matches no trainable "
                f"parameter. There are: {', '.join(names)}."
            )
        selection |= matches
    return {name: p for name, p in trainable.items() if name in selection}


def compute_values(
    penalty: Penalty | Penalties | None, model: nn.Module, *, whole: Whole | None = None
) -> dict[str, Tensor]:
    """Compute Omega of each penalty by name, 0-d; `whole` as for `add_gradients`."""
    with torch.no_grad():
        return {
            term.part: _compute_value(term, select_parameters(term, model), whole)
            for term in penalty or ()
        }


def add_gradients(
    penalty: Penalty | Penalties | None,
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter] | None = None,
    *,
    whole: Whole | None = None,
) -> dict[str, Tensor]:
    """Add grad Omega to `gradients` (by parameter name) in place; return Omega by penalty, 0-d.

    Args:
        parameters: the trainable parameters by name, if known. The selection of each penalty is
            then stored until they change.
        whole: gathers a weight of which this rank holds a slice; None: none is in slices.
    """
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for term in penalty or ():
            weights = _find_selection(term, model, parameters)
            values[term.part] = add_selected(term, weights, gradients, whole)
    return values


def add_selected(
    term: Penalty,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    whole: Whole | None = None,
) -> Tensor:
    """Add the gradient of one penalty on its weights in place; return its Omega, 0-d."""
    value = _compute_value(term, weights, whole)
    for name, weight in weights.items():
        term.add_gradient(weight, gradients[name])
    return value


class _Selections(dict[Penalty, tuple[list[nn.Parameter], dict[str, nn.Parameter]]]):
    """Selected parameters of each penalty on one model, with those that there were."""


def _find_selection(
    penalty: Penalty, model: nn.Module, parameters: Mapping[str, nn.Parameter] | None
) -> dict[str, nn.Parameter]:
    """Select parameters, or return the stored selection if the same parameters are trainable."""
    if parameters is None:
        return select_parameters(penalty, model)
    selections, current = find_record(model, _Selections), list(parameters.values())
    before, selection = selections.get(penalty, ([], {}))
    if len(before) != len(current) or not all(map(is_, before, current)):
        selection = select_parameters(penalty, model)
        selections[penalty] = current, selection
    return selection


def _compute_value(term: Penalty, weights: Mapping[str, Tensor], whole: Whole | None) -> Tensor:
    """Sum Omega over parameters, in at least float32, gathering one parameter at a time."""
    values = []
    for weight in weights.values():
        if whole is not None:
            weight = whole(weight)
        values.append(term.value(weight.to(torch.promote_types(weight.dtype, torch.float32))))
    return torch.stack(values).sum() if values else torch.zeros((), dtype=torch.float32)


def _patterns(on: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (on,) if isinstance(on, str) or not isinstance(on, Iterable) else tuple(on)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ModelError(
            f"on is {on!r}. It must be a pattern of parameter names, or several. Leave it out for "
            f"all but biases and norm parameters. on='*' is every parameter."
        )
    return patterns


def _list_exempt(model: nn.Module) -> set[str]:
    """List biases (`bias`, `bias_hh_l0`, `in_proj_bias`) and parameters of norm layers, by name.

    A norm layer is one with "Norm" in the name of its class: LayerNorm, BatchNorm2d, MyRMSNorm.
    """
    names = set()
    for prefix, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or name.startswith("bias") or name.endswith("bias"):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names
