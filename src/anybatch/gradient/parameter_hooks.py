"""Hooks of the user's on parameters: they run once an update, on its whole gradient.

    plain PyTorch, one backward pass      g  ->  hooks of the tensor  ->  .grad  ->  post hooks
    here, after the sum over all parts    G  ->  hooks of the tensor  ->  .grad  ->  post hooks

During the backward passes of parts the hooks are set aside: a hook that clamps would otherwise
clamp each part, and the sum of clamped parts is not the clamped sum.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.errors import ModelError

__all__ = ["ParameterHooks", "hooks_of"]

Hook = Callable[[Any], Any]


def hooks_of(parameters: Mapping[str, nn.Parameter]) -> "ParameterHooks | None":
    """Collect the hooks on parameters; None where there are none."""
    hooked = {
        name: p
        for name, p in parameters.items()
        if p._backward_hooks or p._post_accumulate_grad_hooks
    }
    return ParameterHooks(hooked) if hooked else None


class ParameterHooks:
    """The hooks on the parameters of a model, during one update.

    Args:
        hooked: the parameters with hooks, by name.
    """

    def __init__(self, hooked: Mapping[str, nn.Parameter]) -> None:
        self._hooked = dict(hooked)
        self._before = {name: list(p._backward_hooks or ()) for name, p in hooked.items()}

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Run a backward pass without the hooks."""
        aside = [
            (hooks, dict(hooks))
            for p in self._hooked.values()
            for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
            if hooks
        ]
        for hooks, _ in aside:
            hooks.clear()  # the engine holds this dict, and reads it at each pass
        try:
            yield
        finally:
            for hooks, own in aside:
                hooks.update(own)

    def apply(self, sums: dict[str, Tensor]) -> None:
        """Replace the sums by what the tensor hooks make of them, in the order of the hooks.

        Raises:
            ModelError: a forward pass that registers hooks, or a gradient of another shape.
        """
        for name, p in self._hooked.items():
            if list(p._backward_hooks or ()) != self._before[name]:
                raise ModelError(
                    f"The forward pass registers a hook on the parameter {name}. It would be "
                    f"registered once for each micro-batch. Register it once, before training."
                )
            for hook in list((p._backward_hooks or {}).values()):
                given = sums[name].to(p.dtype)
                changed = hook(given)
                if changed is None:
                    continue
                if changed.shape != p.shape:
                    raise ModelError(
                        f"A hook on the parameter {name} returned a gradient of shape "
                        f"{tuple(changed.shape)}. It must return the shape of the parameter, "
                        f"{tuple(p.shape)}, or None."
                    )
                sums[name] = changed.detach().to(sums[name].dtype)

    def finish(self) -> None:
        """Run the hooks that wait for a gradient to be in `.grad`."""
        for p in self._hooked.values():
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                with torch.enable_grad():
                    hook(p)
