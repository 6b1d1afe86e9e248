"""Small networks: a linear classifier, multilayer perceptrons, LeNet."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod, sqrt

import torch
from torch import nn

from anybatch.errors import ModelError

__all__ = ["lenet", "mlp", "sigmoid_mlp", "softmax_regression", "tanh_mlp", "use_channels_last"]


def softmax_regression(
    inputs: Sequence[int] = (64,), classes: int = 10, zeros: bool = False
) -> nn.Module:
    """Build a linear layer: logits W x + b. The softmax is in the loss.

    Example:
        >>> softmax_regression(inputs=[2, 3], classes=4)(torch.zeros(5, 2, 3)).shape
        torch.Size([5, 4])

    Args:
        inputs: shape of one input, flattened.
        classes: number of logits.
        zeros: start at W = 0 and b = 0, where every class has the same probability. The loss is
            convex: the start affects how long training takes, but not where it ends.

    Source: zeros as in TensorFlow, MNIST for beginners (mnist_softmax.py), and deeplearning.net
        (logistic_sgd.py).
    """
    linear = nn.Linear(prod(inputs), classes)
    if zeros:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear)


def mlp(
    inputs: Sequence[int] = (64,), hidden: Sequence[int] = (128,), classes: int = 10
) -> nn.Module:
    """Build linear layers with ReLU between them.

    Example:
        >>> mlp(inputs=[6], hidden=[8, 8], classes=4)(torch.zeros(5, 6)).shape
        torch.Size([5, 4])

    Args:
        inputs: shape of one input, flattened.
        hidden: width of each hidden layer.
        classes: number of logits.
    """
    widths = [prod(inputs), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def lenet(
    image: int = 28, classes: int = 10, padding: int | None = None, ceil_mode: bool = False
) -> nn.Module:
    """Build the layers of Caffe's LeNet: conv 20, pool, conv 50, pool, dense 500, ReLU, dense.

    Caffe's takes 28x28. On smaller images its two unpadded 5x5 convolutions would leave nothing to
    pool. So below 16 pixels they are padded by 2, which keeps the size: 8x8 goes 8 -> 4 -> 2, and
    the dense layer sees 50 maps of 2x2, not 4x4.

    Example:
        >>> lenet(image=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Args:
        image: height and width of the input [B, 1, image, image].
        classes: number of logits.
        padding: of both convolutions; None: 0 from 16 pixels on, else 2.
        ceil_mode: pool the last row and column of an odd map too.

    Source: LeCun et al. 1998; the layer sizes of Caffe's examples/mnist/lenet.prototxt.
    """
    padding = (0 if image >= 16 else 2) if padding is None else padding
    side = image
    for _ in range(2):
        side = (side + 2 * padding - 4 + ceil_mode) // 2
    if side < 1:
        raise ModelError(f"lenet cannot pool images of {image} pixels twice. Use 8 or more.")
    return nn.Sequential(
        nn.Conv2d(1, 20, 5, padding=padding),
        nn.MaxPool2d(2, ceil_mode=ceil_mode),
        nn.Conv2d(20, 50, 5, padding=padding),
        nn.MaxPool2d(2, ceil_mode=ceil_mode),
        nn.Flatten(),
        nn.Linear(50 * side * side, 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


def use_channels_last(model: nn.Module) -> nn.Module:
    """Store the weights of convolutions with the channels last, and return the model.

    On a CPU training then takes a fifth to a third less time.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def tanh_mlp(inputs: Sequence[int] = (64,), hidden: int = 500, classes: int = 10) -> nn.Module:
    """Build deeplearning.net's perceptron: W2 tanh(W1 x + b1) + b2.

    W1 starts uniform in +-sqrt(6 / (fan_in + fan_out)); b1, W2 and b2 start at 0, so that every
    class has the same probability before the first update. The tutorial's cost has 0.0001 sum w^2
    over W1 and W2, without the 1/2: L2(2 * 0.0001).

    Example:
        >>> tanh_mlp(inputs=[6], hidden=8, classes=4)(torch.ones(5, 6)).abs().sum().item()
        0.0

    Args:
        inputs: shape of one input, flattened.
        hidden: number of tanh units.
        classes: number of logits.

    Source: deeplearning.net, mlp.py (HiddenLayer, MLP) and logistic_sgd.py; the bound is that of
        Glorot and Bengio 2010, equation 16.
    """
    first, last = nn.Linear(prod(inputs), hidden), nn.Linear(hidden, classes)
    limit = sqrt(6 / (first.in_features + first.out_features))
    nn.init.uniform_(first.weight, -limit, limit)
    for parameter in (first.bias, last.weight, last.bias):
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)


def sigmoid_mlp(inputs: Sequence[int] = (64,), hidden: int = 25, classes: int = 10) -> nn.Module:
    """Build Ng's perceptron, for `sigmoid_cross_entropy`: W2 sigmoid(W1 x + b1) + b2.

    Weights and biases start uniform in +-0.12: biases are a column of the course's matrices. Its
    cost has (lambda / 2m) sum w^2 over the weights, with m examples in the training set:
    L2(lambda / m).

    Example:
        >>> sigmoid_mlp(inputs=[6], hidden=8, classes=4)(torch.zeros(5, 6)).shape
        torch.Size([5, 4])

    Args:
        inputs: shape of one input, flattened.
        hidden: number of sigmoid units.
        classes: number of logits.

    Source: Ng, Machine Learning (Coursera), exercise 4: 400-25-10 units, randInitializeWeights.m
        (epsilon_init = 0.12), nnCostFunction.m.
    """
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(prod(inputs), hidden), nn.Sigmoid(), nn.Linear(hidden, classes)
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.12, 0.12)
    return model
