"""Models and losses that recipes name, and the optimiser of Caffe."""

from collections.abc import Callable
from typing import Any

from torch import nn

from anybatch.example_losses import ExampleLosses
from anybatch.zoo.caffe import CaffeSGD, caffe_lenet
from anybatch.zoo.gpt import gpt
from anybatch.zoo.gru import gru_classifier
from anybatch.zoo.losses import (
    cross_entropy,
    sigmoid_cross_entropy,
    squared_error,
    token_cross_entropy,
)
from anybatch.zoo.networks import lenet, mlp, sigmoid_mlp, softmax_regression, tanh_mlp
from anybatch.zoo.pretrained import pretrained
from anybatch.zoo.resnet import resnet_small
from anybatch.zoo.tensorflow import cifar_tutorial

__all__ = [
    "CaffeSGD",
    "caffe_lenet",
    "cifar_tutorial",
    "cross_entropy",
    "gpt",
    "gru_classifier",
    "lenet",
    "losses",
    "mlp",
    "models",
    "pretrained",
    "resnet_small",
    "sigmoid_cross_entropy",
    "sigmoid_mlp",
    "softmax_regression",
    "squared_error",
    "tanh_mlp",
    "token_cross_entropy",
]

models: dict[str, Callable[..., nn.Module]] = {
    "caffe_lenet": caffe_lenet,
    "cifar_tutorial": cifar_tutorial,
    "gpt": gpt,
    "gru_classifier": gru_classifier,
    "lenet": lenet,
    "mlp": mlp,
    "pretrained": pretrained,
    "resnet_small": resnet_small,
    "sigmoid_mlp": sigmoid_mlp,
    "softmax_regression": softmax_regression,
    "tanh_mlp": tanh_mlp,
}
losses: dict[str, Callable[[nn.Module, Any], ExampleLosses]] = {
    "cross_entropy": cross_entropy,
    "sigmoid_cross_entropy": sigmoid_cross_entropy,
    "squared_error": squared_error,
    "token_cross_entropy": token_cross_entropy,
}
