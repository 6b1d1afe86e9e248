"""`torch.einsum`: sums of products, by the letters of their dimensions.

    y[out] = sum x[..] p[..] ...,      g_i[of p] = sum d_i[out] x_i[..] ...

The second sum runs over all letters that p does not have. One letter of the output is the example
i.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.calls import Call, Context, as_factor
from anybatch.ledger.contractions.placement import Placement
from anybatch.ledger.gradient_taps import tap

__all__ = ["Letters", "parse_einsum", "run_einsum"]

Factor = tuple[Tensor, str]
"""A tensor, and one letter for each of its dimensions."""


class Letters(NamedTuple):
    """A call of `torch.einsum`, with one letter for each dimension of each tensor."""

    operands: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    output: str
    spare: str  # a letter that the equation does not contain


def parse_einsum(equation: Any, *operands: Any) -> Letters | None:
    """Parse the arguments of `torch.einsum`; None: another form, or an operand broadcasts."""
    if not isinstance(equation, str):
        return None
    if len(operands) == 1 and not isinstance(operands[0], Tensor):
        operands = tuple(operands[0])
    spare, *free = (letter for letter in string.ascii_letters if letter not in equation)
    left, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    inputs, dots = [], ""
    for letters, x in zip(left.split(","), operands, strict=True):
        # Letters for "...", the last dimension first, so that shorter operands share them.
        ellipsis = "".join(free[: x.ndim - len(letters) + 1])[::-1] if "." in letters else ""
        dots = max(dots, ellipsis, key=len)
        inputs.append(letters.replace(".", ellipsis))
    every = "".join(inputs)
    if not arrow:
        output = "." + "".join(sorted(x for x in {*every} - {*dots} if every.count(x) == 1))
    sizes = {
        (letter, n)
        for letters, x in zip(inputs, operands, strict=True)
        for letter, n in zip(letters, x.shape, strict=True)
    }
    if len(sizes) > len({*every}) or any(len({*letters}) < len(letters) for letters in inputs):
        return None
    return Letters(tuple(operands), tuple(inputs), output.replace(".", dots), spare)


def run_einsum(call: Call, context: Context, letters: Letters) -> Any:
    """Run an einsum. The example is a letter of the output that no parameter has."""
    detach, size = context.tracker.detach, context.num_examples
    output = torch.einsum(call.args[0], *map(detach, letters.operands))
    pairs = list(zip(letters.operands, letters.inputs, strict=True))
    excluded = "".join(inputs for x, inputs in pairs if id(x) in call.sites)
    shape = tuple(
        0 if letter in excluded else n
        for letter, n in zip(letters.output, output.shape, strict=True)
    )
    placement = context.place(call, shape, output.ndim)
    if placement is None:
        return context.run_shared(call)
    data = [(x, inputs) for x, inputs in pairs if id(x) not in call.sites]
    uses = [(x, inputs, call.sites[id(x)]) for x, inputs in pairs if id(x) in call.sites]
    for _, _, site in uses:
        context.tracker.count_use(site)
    example = letters.output[placement.dim]

    def receive(d: Tensor, *saved: Tensor) -> None:
        factors = [(as_factor(x, d), inputs) for x, (_, inputs) in zip(saved, data, strict=True)]
        factors = [
            _split_examples(factor, example + letters.spare, placement, size)
            for factor in ((d, letters.output), *factors)
        ]

        def make(_: Placement) -> list[Contraction]:
            return [_make_einsum(factors, p.shape, inputs, example) for p, inputs, _ in uses]

        context.receive([site for _, _, site in uses], placement, make, d)

    return tap(output, receive, *(x for x, _ in data))


def _split_examples(factor: Factor, pair: str, placement: Placement, num_examples: int) -> Factor:
    """Split a dimension of examples and their rows into two, with the letters of a pair."""
    x, letters = factor
    example, rows = pair[0], pair[1]
    if placement.kind == "dim" or example not in letters:
        return x, letters
    k, is_outer = letters.index(example), placement.kind == "outer"
    sizes = (num_examples, -1) if is_outer else (-1, num_examples)
    split: Tensor = x.unflatten(k, sizes)  # type: ignore[no-untyped-call]
    return split, letters.replace(example, pair if is_outer else rows + example)


def _make_einsum(
    factors: Sequence[Factor], shape: torch.Size, letters: str, example: str
) -> Contraction:
    """Make the contraction of a parameter of some shape and letters.

    The equation only sums over a letter that no factor has. A factor of ones stands for it.
    """
    every = "".join(inputs for _, inputs in factors)
    alone = "".join(letter for letter in letters if letter not in every)
    if alone:
        sizes = [shape[letters.index(letter)] for letter in alone]
        factors = [*factors, (factors[0][0].new_ones(sizes), alone)]
    tensors, inputs = zip(*factors, strict=True)
    return Einsum(tensors, inputs, example, letters)


@final
@dataclass(frozen=True, slots=True)
class Einsum(Contraction):
    """Use of a parameter by a product of factors, the gradient d of the output first."""

    operands: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    example: str
    letters: str  # of the parameter

    def __len__(self) -> int:
        return self.operands[0].shape[self.inputs[0].index(self.example)]

    def take(self, start: int, stop: int, step: int = 1) -> Self:
        def cut(x: Tensor, letters: str) -> Tensor:
            if self.example not in letters:
                return x
            return x.movedim(letters.index(self.example), 0)[start:stop:step].movedim(
                0, letters.index(self.example)
            )

        return replace(self, operands=tuple(map(cut, self.operands, self.inputs)))

    def gradients(self) -> Tensor:
        return self._multiply(self.example + self.letters)

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        return self._multiply(self.letters, c)

    def _multiply(self, output: str, c: Tensor | None = None) -> Tensor:
        operands, inputs = self.operands, self.inputs
        if c is not None:
            operands, inputs = (*operands, c.to(operands[0].dtype)), (*inputs, self.example)
        return torch.einsum(f"{','.join(inputs)}->{output}", *operands)
