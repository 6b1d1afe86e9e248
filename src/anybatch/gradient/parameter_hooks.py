"""Run the user's hooks on parameters once per update, on its whole gradient.

    plain PyTorch, one backward pass      g  ->  tensor hooks  ->  .grad  ->  post hooks
    here, after the sum                   G  ->  tensor hooks  ->  .grad  ->  post hooks

The hooks are disabled during the backward passes of micro-batches. A hook that clamps would
otherwise clamp each micro-batch, and a sum of clamped gradients is not the clamped sum.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anybatch.errors import ModelError

__all__ = ["ParameterHooks"]


class ParameterHooks:
    """Hooks on the parameters of a model, during one update.

    Args:
        parameters: those with hooks, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._before = {name: list(p._backward_hooks or ()) for name, p in parameters.items()}

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Run a backward pass without the hooks."""
        disabled = [
            (hooks, dict(hooks))
            for p in self._parameters.values()
            for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
            if hooks
        ]
        for hooks, _ in disabled:
            hooks.clear()  # autograd's engine reads this very dict at each pass
        try:
            yield
        finally:
            for hooks, copy in disabled:
                hooks.update(copy)

    def apply(self, sums: dict[str, Tensor]) -> None:
        """Replace the sums by the results of the tensor hooks, in the order of the hooks.

        Raises:
            ModelError: a forward pass that registers hooks, or a gradient of another shape.
        """
        for name, p in self._parameters.items():
            if list(p._backward_hooks or ()) != self._before[name]:
                raise ModelError(
                    f"The forward pass registers a hook on the parameter {name}. It would be "
                    f"registered once for each micro-batch. Register it once, before training."
                )
            for hook in list((p._backward_hooks or {}).values()):
                result = hook(sums[name].to(p.dtype))
                if result is None:
                    continue
                if result.shape != p.shape:
                    raise ModelError(
                        f"A hook on the parameter {name} returned a gradient of shape "
                        f"{tuple(result.shape)}. It must return the shape of the parameter, "
                        f"{tuple(p.shape)}, or None."
                    )
                sums[name] = result.detach().to(sums[name].dtype)

    def finish(self) -> None:
        """Run the post hooks, once the gradients are in `.grad`."""
        for p in self._parameters.values():
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                with torch.enable_grad():
                    hook(p)
