"""The two perceptrons with one hidden layer: deeplearning.net's of tanh, Ng's of sigmoids.

    logits = W2 s(W1 x + b1) + b2,    s = tanh or sigmoid

What follows the logits, softmax or ten sigmoids, is in the loss.
"""

from collections.abc import Sequence
from math import prod, sqrt

from torch import nn

__all__ = ["sigmoid_mlp", "tanh_mlp"]


def tanh_mlp(inputs: Sequence[int] = (64,), hidden: int = 500, classes: int = 10) -> nn.Module:
    """A hidden layer of tanh below a softmax regression that starts at zeros.

    W1 starts uniform in +-sqrt(6 / (fan_in + fan_out)); b1, W2 and b2 at 0, so that every class
    has the same probability before the first update. The tutorial's cost has
    0.0001 sum w^2 over W1 and W2, a full sum of squares: L2(2 * 0.0001).

    Args:
        inputs: shape of one input, flattened.
        hidden: number of tanh units.
        classes: number of logits.

    Source: deeplearning.net, mlp.py (HiddenLayer, MLP) and logistic_sgd.py; the bound is that of
        Glorot and Bengio 2010, equation 16.
    """
    first, last = nn.Linear(prod(inputs), hidden), nn.Linear(hidden, classes)
    bound = sqrt(6 / (first.in_features + first.out_features))
    nn.init.uniform_(first.weight, -bound, bound)
    for start_at_zero in (first.bias, last.weight, last.bias):
        nn.init.zeros_(start_at_zero)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)


def sigmoid_mlp(inputs: Sequence[int] = (64,), hidden: int = 25, classes: int = 10) -> nn.Module:
    """A hidden layer of sigmoids, for `sigmoid_cross_entropy`.

    Weights start uniform in +-0.12, and biases too: they are a column of the course's matrices.
    Its cost has (lambda / 2m) sum w^2 over the weights alone, m examples in the whole training
    set: L2(lambda / m).

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
