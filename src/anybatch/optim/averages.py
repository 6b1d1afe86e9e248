"""Moving averages of the weights.

    a <- d * a + (1 - d) * w    after each update;    d = decay, or min(decay, (1 + n) / (10 + n))

a are the averages, at first the weights as they are; w the weights after update n, counted from
1. Buffers, such as running statistics, are copied. The code adds (1 - d) * (w - a) instead, so
that a weight which never changes keeps its bits.
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
    """A moving average of a model's weights, beside the model.

    Averages of weights narrower than float32 are kept in float32, in which a small 1 - decay is
    not lost. To carry one in the checkpoints of a run: `steps(..., state={"average": average})`.

    Args:
        model: its weights are the averages at first.
        decay: at least 0, below 1.
        warm_up: whether the decay is at most (1 + n) / (10 + n) at update n.

    Raises:
        RecipeError: a decay out of its range.

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
        self._weights = {name: _wide(w).clone() for name, w in _weights(model).items()}
        self._buffers = {name: b.clone() for name, b in _buffers(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an update.

        Raises:
            ModelError: another model's weights.
        """
        weights = _weights(model)
        _check(self._weights, weights)
        self.num_updates += 1
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay
        for name, average in self._weights.items():
            average.lerp_(weights[name].to(average), 1 - decay)
        self._buffers = {name: b.clone() for name, b in _buffers(model).items()}

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give a model the averages as its weights, and the buffers of the last update.

        Raises:
            ModelError: another model's weights.
        """
        _check(self._weights, _weights(model))
        _copy(self._weights | self._buffers, model)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages as its weights, and afterwards its own again, bit for bit.

        What happens to weights and buffers in between is undone.
        """
        kept = {
            name: tensor.clone() for name, tensor in (_weights(model) | _buffers(model)).items()
        }
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(kept, model)

    def state_dict(self) -> dict[str, Any]:
        """All that later updates depend on; tensors are not copied."""
        return {
            "decay": self.decay,
            "warm_up": self.warm_up,
            "num_updates": self.num_updates,
            "weights": dict(self._weights),
            "buffers": dict(self._buffers),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` has given.

        Raises:
            RunError: an average of another decay; ModelError: one of another model.
        """
        if not isinstance(state, Mapping) or "decay" not in state:
            raise RunError("The state is none of an average. Pass what state_dict() has given.")
        before = state["decay"], state["warm_up"]
        if before != (self.decay, self.warm_up):
            raise RunError(
                f"the average was begun with decay and warm_up = {before}, and cannot go on with "
                f"{(self.decay, self.warm_up)}: it would be neither. Restore them, or begin anew."
            )
        _check(self._weights, state["weights"])
        for name, average in self._weights.items():
            average.copy_(state["weights"][name])
        devices = {name: buffer.device for name, buffer in self._buffers.items()}
        self._buffers = {
            name: buffer.to(devices.get(name, buffer.device), copy=True)
            for name, buffer in state["buffers"].items()
        }
        self.num_updates = state["num_updates"]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    _check_model(model)
    return {name: p.detach() for name, p in unwrap(model).named_parameters() if _has_mean(p)}


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is {model!r}. An average is of the weights of a torch.nn.Module.")


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What is copied: buffers, and parameters of integers."""
    whole = {name: p.detach() for name, p in unwrap(model).named_parameters() if not _has_mean(p)}
    return whole | {name: b.detach() for name, b in model.named_buffers()}


def _has_mean(weight: Tensor) -> bool:
    return weight.is_floating_point() or weight.is_complex()


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype.itemsize < 4 else weight


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Into the model's own tensors: what refers to them, such as an optimiser, still does."""
    own = _weights(model) | _buffers(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _check(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    expected, came = ({n: tuple(t.shape) for n, t in ts.items()} for ts in (averages, weights))
    for name in sorted(expected.keys() | came.keys()):
        if expected.get(name) != came.get(name):
            raise ModelError(
                f"the average has {name} of shape {expected.get(name)}, got {came.get(name)} "
                f"(None: there is none). Pass the model that the average was made from, or one "
                f"built as it was."
            )
