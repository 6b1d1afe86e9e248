"""Mini-batch gradient descent, one example at a time, in NumPy float64.

    forward, backward: each example on its own        gradient.py, network.py, layers.py, ...
    sum, divide, add the penalty: once a batch        gradient.py, penalties.py
    update: once a batch                              optimisers.py, training.py

This is the definition, written to be read. The tests compare the library, which computes all
examples at once, with it. It uses NumPy only.

Parameters are addressed by layer and name, in torch's shapes. Those of a `torch.nn.Sequential` are

    [{n: p.detach().double().numpy() for n, p in m.named_parameters()} for m in sequential]
"""

from anybatch.reference.convolution import Conv2d
from anybatch.reference.gradient import (
    BatchGradient,
    ExampleGradient,
    Reduction,
    batch_gradient,
    example_gradient,
)
from anybatch.reference.layers import Dense, Flatten, Layer, ReLU, Sigmoid, Stored, Tanh
from anybatch.reference.losses import Loss, Output, SoftmaxCrossEntropy, SquaredError
from anybatch.reference.network import Network, draw_parameters
from anybatch.reference.normalisation import LocalResponseNorm
from anybatch.reference.optimisers import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Momentum,
    Nesterov,
    Optimiser,
    RMSProp,
)
from anybatch.reference.parameters import (
    Array,
    Parameters,
    add_up,
    elementwise,
    flatten,
    name_arrays,
)
from anybatch.reference.penalties import L1, L2, Penalty
from anybatch.reference.pooling import MaxPool2d, count_windows
from anybatch.reference.training import Batch, Step, cut, measure_accuracy, train

__all__ = [
    "L1",
    "L2",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Array",
    "Batch",
    "BatchGradient",
    "Conv2d",
    "Dense",
    "ExampleGradient",
    "Flatten",
    "Layer",
    "LocalResponseNorm",
    "Loss",
    "MaxPool2d",
    "Momentum",
    "Nesterov",
    "Network",
    "Optimiser",
    "Output",
    "Parameters",
    "Penalty",
    "RMSProp",
    "ReLU",
    "Reduction",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "Step",
    "Stored",
    "Tanh",
    "add_up",
    "batch_gradient",
    "count_windows",
    "cut",
    "draw_parameters",
    "elementwise",
    "example_gradient",
    "flatten",
    "measure_accuracy",
    "name_arrays",
    "train",
]
