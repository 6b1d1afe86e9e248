"""Exponential moving average of the weights.

    a <- d * a + (1 - d) * w    after each update;    d = decay, or min(decay, (1 + n) / (10 + n))

a are the averages, w the weights after update n, counted from 1. At first a = w. Buffers, such as
running statistics, are copied. The code computes a + (1 - d) * (w - a), so that a weight that never
changes keeps its bits. `torch.optim.swa_utils` averages bfloat16 weights in bfloat16, which loses a
small 1 - d; here they are averaged in float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from anybatch.batch import is_number
from anybatch.compiled import unwrap
from anybatch.errors import ModelError, RecipeError, RunError

__all__ = ["Average"]


@final
class Average:
    """Exponential moving average of the weights of a model.

        >>> import torch
        >>> import anybatch as ab
        >>> model = torch.nn.Linear(2, 1)
        >>> average = ab.Average(model, decay=0.99)
        >>> average.update(model)  # after each update; or steps(..., state={"average": average})
        >>> with average.swapped(model):
        ...     outputs = model(torch.ones(1, 2))  # with the averages as weights

    Averages of weights narrower than float32 are kept in float32. To save an average in the
    checkpoints of a run: `steps(..., state={"average": average})`.

    Args:
        model: its weights are the first averages.
        decay: at least 0, below 1.
        warm_up: whether the decay is at most (1 + n) / (10 + n) at update n.

    Raises:
        RecipeError: the decay is out of range.

    Source: TensorFlow, `tf.train.ExponentialMovingAverage`; warm_up is its `num_updates`.
    """

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = False) -> None:
        if not (is_number(decay) and 0 <= decay < 1):
            raise RecipeError(
                f"Average expects a decay of at least 0 and below 1, such as 0.999, got {decay!r}."
            )
        self.decay = float(decay)
        self.warm_up = warm_up
        self.num_updates = 0
        self._weights = {name: _widen(w).clone() for name, w in _list_weights(model).items()}
        self._buffers = {name: b.clone() for name, b in _list_buffers(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the weights after an update.

        Raises:
            ModelError: the weights are those of another model.
        """
        weights = _list_weights(model)
        _check_shapes(self._weights, weights)
        self.num_updates += 1
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay
        for name, average in self._weights.items():
            average.lerp_(weights[name].to(average), 1 - decay)
        self._buffers = {name: b.clone() for name, b in _list_buffers(model).items()}

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages, and the buffers of the last update, to a model.

        Raises:
            ModelError: the weights are those of another model.
        """
        _check_shapes(self._weights, _list_weights(model))
        _copy(self._weights | self._buffers, model)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Use the averages as weights of the model, and restore its own afterwards, bit for bit.

        All changes to weights and buffers in between are undone.
        """
        tensors = _list_weights(model) | _list_buffers(model)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(copies, model)

    def state_dict(self) -> dict[str, Any]:
        """Return all that later updates depend on; tensors are not copied."""
        return {
            "decay": self.decay,
            "warm_up": self.warm_up,
            "num_updates": self.num_updates,
            "weights": dict(self._weights),
            "buffers": dict(self._buffers),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` has returned.

        Raises:
            RunError: the average has another decay. ModelError: it is of another model.
        """
        if not isinstance(state, Mapping) or "decay" not in state:
            raise RunError("The state is none of an average. Pass what state_dict() has returned.")
        before = state["decay"], state["warm_up"]
        if before != (self.decay, self.warm_up):
            raise RunError(
                f"the average was begun with decay and warm_up = {before}, and cannot go on with "
                f"{(self.decay, self.warm_up)}: it would be neither. Restore them, or begin anew."
            )
        _check_shapes(self._weights, state["weights"])
        for name, average in self._weights.items():
            average.copy_(state["weights"][name])
        devices = {name: buffer.device for name, buffer in self._buffers.items()}
        self._buffers = {
            name: buffer.to(devices.get(name, buffer.device), copy=True)
            for name, buffer in state["buffers"].items()
        }
        self.num_updates = state["num_updates"]


def _list_weights(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is {model!r}. An average is of the weights of a torch.nn.Module.")
    return {name: p.detach() for name, p in unwrap(model).named_parameters() if _has_mean(p)}


def _list_buffers(model: nn.Module) -> dict[str, Tensor]:
    """List what is copied: buffers, and parameters of integers."""
    integers = {n: p.detach() for n, p in unwrap(model).named_parameters() if not _has_mean(p)}
    return integers | {name: b.detach() for name, b in model.named_buffers()}


def _has_mean(weight: Tensor) -> bool:
    return weight.is_floating_point() or weight.is_complex()


def _widen(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype.itemsize < 4 else weight


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy in place, since an optimiser refers to the model's tensors."""
    targets = _list_weights(model) | _list_buffers(model)
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)


def _check_shapes(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    ours, theirs = ({n: tuple(t.shape) for n, t in ts.items()} for ts in (averages, weights))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ModelError(
                f"the average has {name} of shape {ours.get(name)}, and the model "
                f"{theirs.get(name)} (None: there is none). Pass the model that the average was "
                f"made from, or one built in the same way."
            )
