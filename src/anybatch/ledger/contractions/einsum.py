"""Sums of products, by the letters of their dimensions: `einsum`.

    y[out] = sum_rest  x[..] p[..] ...,      g_i[of p] = sum  d_i[out] x_i[..] ...

the second sum over all letters that p has not. Example i is one of the letters of out.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.placement import Placement

__all__ = ["Letters", "Summed", "letters_of", "split"]


class Letters(NamedTuple):
    """An einsum whose dimensions all have letters."""

    operands: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    output: str
    spare: str


@final
@dataclass(frozen=True, slots=True)
class Summed(Contraction):
    """Use of a parameter with these letters by what it was multiplied with, and by d."""

    operands: tuple[Tensor, ...]  # d first
    inputs: tuple[str, ...]
    example: str
    letters: str

    @classmethod
    def of(
        cls, shape: torch.Size, letters: str, example: str, parts: Sequence[tuple[Tensor, str]]
    ) -> Self:
        """Letters that none of the parts has are those along which p was only summed."""
        known = "".join(own for _, own in parts)
        alone = "".join(letter for letter in letters if letter not in known)
        if alone:
            sizes = [shape[letters.index(letter)] for letter in alone]
            parts = [*parts, (parts[0][0].new_ones(sizes), alone)]
        return cls(tuple(x for x, _ in parts), tuple(own for _, own in parts), example, letters)

    def __len__(self) -> int:
        return self.operands[0].shape[self.inputs[0].index(self.example)]

    def take(self, start: int, stop: int) -> Self:
        def cut(x: Tensor, own: str) -> Tensor:
            if self.example not in own:
                return x
            return x.narrow(own.index(self.example), start, stop - start)

        return replace(self, operands=tuple(map(cut, self.operands, self.inputs)))

    def gradients(self) -> Tensor:
        return self._sum(self.example + self.letters)

    def total(self, c: Tensor | None) -> Tensor:
        return self._sum(self.letters, c)

    def _sum(self, output: str, c: Tensor | None = None) -> Tensor:
        operands, inputs = self.operands, self.inputs
        if c is not None:
            operands, inputs = (*operands, c.to(operands[0].dtype)), (*inputs, self.example)
        return torch.einsum(f"{','.join(inputs)}->{output}", *operands)


def split(
    x: Tensor, own: str, pair: str, placement: Placement, num_examples: int
) -> tuple[Tensor, str]:
    """A tensor whose examples share a dimension with their rows, with one for each of the pair."""
    example, rows = pair[0], pair[1]
    if placement.kind == "dim" or example not in own:
        return x, own
    k, is_outer = own.index(example), placement.kind == "outer"
    sizes = (num_examples, -1) if is_outer else (-1, num_examples)
    laid: Tensor = x.unflatten(k, sizes)  # type: ignore[no-untyped-call]
    return laid, own.replace(example, pair if is_outer else rows + example)


def letters_of(equation: Any, *operands: Any) -> Letters | None:
    """The call of `torch.einsum` spelt out; None: not in this form, or it broadcasts."""
    if not isinstance(equation, str):
        return None
    if len(operands) == 1 and not isinstance(operands[0], Tensor):
        operands = tuple(operands[0])
    spare, *free = (letter for letter in string.ascii_letters if letter not in equation)
    left, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    spelt, dots = [], ""
    for own, x in zip(left.split(","), operands, strict=True):
        stretch = "".join(free[: x.ndim - len(own) + 1])[::-1] if "." in own else ""
        dots = max(dots, stretch, key=len)
        spelt.append(own.replace(".", stretch))
    together = "".join(spelt)
    if not arrow:
        once = sorted(x for x in {*together} - {*dots} if together.count(x) == 1)
        output = "." + "".join(once)
    sizes = {
        (letter, n)
        for own, x in zip(spelt, operands, strict=True)
        for letter, n in zip(own, x.shape, strict=True)
    }
    if len(sizes) > len({*together}) or any(len({*own}) < len(own) for own in spelt):
        return None
    return Letters(tuple(operands), tuple(spelt), output.replace(".", dots), spare)
