"""A look at a forward pass: the narrowest type that it computes in, and whether it draws."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anybatch.randomness import GeneratorStates

__all__ = ["Look"]


class Look(TorchFunctionMode):
    """Sees the narrowest type that a forward pass computes in, and whether it draws."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.eps, self.draws = 0.0, False
        self._device = device

    def __enter__(self) -> Self:
        self._states = GeneratorStates.capture(self._device, others=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.draws |= self._states.has_changed(self._device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
            kind = result.device.type
            can_narrow = torch.amp.is_autocast_available(kind)
            if can_narrow and torch.is_autocast_enabled(kind):  # inside one call too, as in a GRU
                self.eps = max(self.eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return result
