"""The sum of the parts' gradients, in at least float32, rounded to the parameter's type once."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anybatch.errors import ModelError

__all__ = ["Accumulator"]


class Accumulator:
    """Collects what each backward pass leaves in `.grad`, starting from nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._narrow = {name: p for name, p in parameters.items() if p.dtype.itemsize < 4}
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self._sums: dict[str, Tensor] = {}
        for p in self._parameters.values():
            p.grad = None

    def add(self) -> None:
        """Take in a backward pass. Float32 and wider types add up in `.grad` by themselves."""
        for name, p in self._narrow.items():
            if p.grad is not None:
                wide = p.grad.float()
                self._sums[name] = wide + self._sums[name] if name in self._sums else wide
                p.grad = None

    def tensors(self) -> list[Tensor]:
        """The sums, in the order of the parameters."""
        return list(self.gradients().values())

    def gradients(self) -> dict[str, Tensor]:
        """The sums by name, zeros for parameters that nothing has reached."""
        for name, p in self._parameters.items():
            if name in self._narrow:
                if name not in self._sums:
                    self._sums[name] = torch.zeros_like(p, dtype=torch.float32)
            elif p.grad is None:
                self._sums[name] = torch.zeros_like(p)
            elif p.grad.layout != torch.strided:
                raise ModelError(
                    f"the gradient of {name} is sparse, expected a dense one: a penalty, a norm "
                    f"and a sum over ranks need every element. Use Embedding(..., sparse=False)."
                )
            else:
                self._sums[name] = p.grad
        return self._sums

    def deliver(self) -> None:
        """Leave the sums in `.grad`."""
        for name, p in self._parameters.items():
            p.grad = self._sums[name].to(p.dtype)
