"""Models and losses that recipes call by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

from anybatch.batch import ExampleLosses
from anybatch.zoo.losses import cross_entropy, squared_error
from anybatch.zoo.networks import lenet, mlp, softmax_regression

__all__ = [
    "cross_entropy",
    "lenet",
    "losses",
    "mlp",
    "models",
    "softmax_regression",
    "squared_error",
]

models: dict[str, Callable[..., nn.Module]] = {
    "lenet": lenet,
    "mlp": mlp,
    "softmax_regression": softmax_regression,
}
losses: dict[str, Callable[[nn.Module, Any], ExampleLosses]] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
}
