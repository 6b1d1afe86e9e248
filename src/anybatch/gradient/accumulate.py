"""The sum of the parts' gradients, in at least float32, rounded to the parameter's type once."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anybatch.errors import ModelError

__all__ = ["Accumulator"]


class Accumulator:
    """Collects what each backward pass leaves in `.grad`, from nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._narrow = {name: p for name, p in parameters.items() if p.dtype.itemsize < 4}
        self.sums: dict[str, Tensor] = {}
        """By name, in the order of the parameters, once `finish` has been called."""
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self.sums = {}
        for p in self._parameters.values():
            p.grad = None

    def add(self) -> None:
        """Take in a backward pass. Float32 and wider types add up in `.grad` by themselves."""
        for name, p in self._narrow.items():
            if p.grad is not None:
                wide = _dense(name, p.grad).float()
                self.sums[name] = wide + self.sums[name] if name in self.sums else wide
                p.grad = None

    def finish(self) -> None:
        """Complete the sums, with zeros for parameters that nothing has reached."""
        found, self.sums = self.sums, {}
        for name, p in self._parameters.items():
            if p.grad is not None:
                self.sums[name] = _dense(name, p.grad)
            elif name in found:
                self.sums[name] = found[name]
            else:
                self.sums[name] = torch.zeros_like(p, dtype=_wide(p))

    def deliver(self) -> None:
        """Leave the sums in `.grad`."""
        for name, p in self._parameters.items():
            if p.grad is not self.sums[name]:
                p.grad = self.sums[name].to(p.dtype)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _dense(name: str, gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise ModelError(
            f"the gradient of {name} is sparse, expected a dense one: a penalty, a norm "
            f"and a sum over ranks need every element. Use Embedding(..., sparse=False)."
        )
    return gradient
