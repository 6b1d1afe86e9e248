"""Penalties on the weights, added once an update, whatever the batch.

    L2(a): Omega = (a/2) * sum |w|^2,  gradient a * w          (torch's weight_decay)
    L1(a): Omega = a * sum |w|,        gradient a * w / |w|     (0 at w = 0)

Weights may be complex: |w| is then the modulus, and the gradient is in torch's convention,
dOmega/dRe(w) + i dOmega/dIm(w).

Each holds the trainable parameters whose names match `on`; by default all but biases and the
parameters of normalisation layers. A parameter with several names (tied) is held once, by any
of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor, nn

from anybatch.batch import is_number
from anybatch.compiled import unwrap
from anybatch.errors import ModelError

__all__ = ["L1", "L2", "Penalties", "Penalty", "add_gradients", "held_by", "values"]

Whole = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Penalty(ABC):
    """One named penalty.

    Args:
        strength: the factor a, at least 0.
        on: patterns of parameter names (`fnmatch`, such as "*.weight"); None: the default rule.
        name: what the part is called in `gradient.parts`; by default the kind and the patterns.
    """

    strength: float
    on: str | Sequence[str] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.strength) and 0 <= self.strength < float("inf")):
            raise ModelError(
                f"{type(self).__name__} expects a finite strength of at least 0, got "
                f"{self.strength}. The penalty is added to the loss, which is minimised."
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
        yield self

    def __add__(self, other: "Penalty | Penalties") -> "Penalties":
        return Penalties((self, *_terms(other)))

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """Omega of one parameter: a 0-d tensor."""

    @abstractmethod
    def add_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        """Add this penalty's gradient for one parameter to `gradient`, in place."""


@final
@dataclass(frozen=True)
class L2(Penalty):
    """(a/2) * sum |w|^2."""

    def value(self, weight: Tensor) -> Tensor:
        return self.strength / 2 * _real(weight).square().sum()

    def add_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        gradient.add_(weight, alpha=self.strength)


@final
@dataclass(frozen=True)
class L1(Penalty):
    """a * sum |w|."""

    def value(self, weight: Tensor) -> Tensor:
        return self.strength * weight.abs().sum()

    def add_gradient(self, weight: Tensor, gradient: Tensor) -> None:
        gradient.add_(weight.sgn(), alpha=self.strength)


@final
@dataclass(frozen=True)
class Penalties:
    """A sum of penalties."""

    terms: tuple[Penalty, ...]

    def __post_init__(self) -> None:
        names = [term.part for term in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise ModelError(
                    f"two penalties are both called {name!r}, expected one name each. "
                    f"Give one of them name=..., or add their strengths."
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


def held_by(penalty: Penalty, model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a penalty holds, by name.

    Raises:
        ModelError: a pattern that no trainable parameter matches.
    """
    model = unwrap(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if penalty.on is None:
        spared = _spared(model)
        return {name: p for name, p in trainable.items() if name not in spared}
    first = {id(p): name for name, p in trainable.items()}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first[id(p)] for name, p in every if id(p) in first}
    held: set[str] = set()
    for pattern in _patterns(penalty.on):
        matches = {names[name] for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ModelError(
                f"the penalty {penalty.part} is on {pattern!r}, which matches no trainable "
                f"parameter. There are: {', '.join(names)}."
            )
        held |= matches
    return {name: p for name, p in trainable.items() if name in held}


def values(
    penalty: Penalty | Penalties | None,
    model: nn.Module,
    *,
    whole: Whole = lambda weight: weight,
) -> dict[str, Tensor]:
    """Omega of each penalty by name, 0-d; `whole` as for `add_gradients`."""
    with torch.no_grad():
        return {term.part: _value(term, held_by(term, model), whole) for term in penalty or ()}


def add_gradients(
    penalty: Penalty | Penalties | None,
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    *,
    whole: Whole = lambda weight: weight,
) -> dict[str, Tensor]:
    """Add grad Omega to `gradients` (by parameter name) in place; returns `values`.

    Args:
        whole: of a weight of which this rank holds a slice, all of it.
    """
    parts: dict[str, Tensor] = {}
    if penalty is None:
        return parts
    with torch.no_grad():
        for term in penalty:
            held = held_by(term, model)
            parts[term.part] = _value(term, held, whole)
            for name, weight in held.items():
                term.add_gradient(weight, gradients[name])
    return parts


def _value(term: Penalty, held: Mapping[str, Tensor], whole: Whole) -> Tensor:
    weights = map(whole, held.values())  # one after the other
    found = [term.value(w.to(torch.promote_types(w.dtype, torch.float32))) for w in weights]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float32)


def _real(weight: Tensor) -> Tensor:
    """Real numbers whose squares add up to those of the weight's moduli."""
    return torch.view_as_real(weight.resolve_conj()) if weight.is_complex() else weight


def _patterns(on: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (on,) if isinstance(on, str) or not isinstance(on, Iterable) else tuple(on)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ModelError(
            f"expected on to be a pattern of parameter names or several, got {on!r}. "
            f"Leave it out for all but biases and norm parameters; on='*' holds every one."
        )
    return patterns


def _spared(model: nn.Module) -> set[str]:
    """Names of biases (`bias`, `bias_hh_l0`, `in_proj_bias`) and of parameters of norm layers.

    A norm layer is one whose class is called so: LayerNorm, BatchNorm2d, MyRMSNorm.
    """
    names = set()
    for prefix, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or name.startswith("bias") or name.endswith("bias"):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names
