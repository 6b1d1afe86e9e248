"""Models and losses that recipes call by name, and the optimiser that torch has not."""

from collections.abc import Callable
from typing import Any

from torch import nn

from anybatch.batch import ExampleLosses
from anybatch.zoo.caffe import CaffeSGD, caffe_lenet
from anybatch.zoo.losses import cross_entropy, sigmoid_cross_entropy, squared_error
from anybatch.zoo.networks import lenet, mlp, softmax_regression
from anybatch.zoo.perceptrons import sigmoid_mlp, tanh_mlp
from anybatch.zoo.resnet import resnet_small
from anybatch.zoo.tensorflow import cifar_tutorial

__all__ = [
    "CaffeSGD",
    "caffe_lenet",
    "cifar_tutorial",
    "cross_entropy",
    "lenet",
    "losses",
    "mlp",
    "models",
    "resnet_small",
    "sigmoid_cross_entropy",
    "sigmoid_mlp",
    "softmax_regression",
    "squared_error",
    "tanh_mlp",
]

models: dict[str, Callable[..., nn.Module]] = {
    "caffe_lenet": caffe_lenet,
    "cifar_tutorial": cifar_tutorial,
    "lenet": lenet,
    "mlp": mlp,
    "resnet_small": resnet_small,
    "sigmoid_mlp": sigmoid_mlp,
    "softmax_regression": softmax_regression,
    "tanh_mlp": tanh_mlp,
}
losses: dict[str, Callable[[nn.Module, Any], ExampleLosses]] = {
    "cross_entropy": cross_entropy,
    "sigmoid_cross_entropy": sigmoid_cross_entropy,
    "squared_error": squared_error,
}
