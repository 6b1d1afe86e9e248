"""Layers and losses of the reference, one example at a time.

Oracles: central differences of the forward pass, which know nothing of backward; and
torch.nn.functional with autograd, which share no code with either pass.

Tolerances: a central difference with h = 1e-5 errs by h^2 f'''/6 (1e-10) and by
rounding (1e-16 / h = 1e-11), so 1e-8 of the norm is asked for; torch in float64 adds in
another order, so 1e-12.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from anybatch import reference
from anybatch.reference import (
    Conv2d,
    Dense,
    Flatten,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    Sigmoid,
    Tanh,
)
from properties import seeded_examples

CASES = [
    (Dense(4, 3), (4,)),
    (Dense(4, 3, bias=False), (4,)),
    (Conv2d(2, 3, 3), (2, 5, 4)),
    (Conv2d(2, 2, (2, 3), stride=(1, 2), padding=(0, 1), bias=False), (2, 4, 5)),
    (Conv2d(1, 2, 2, stride=3), (1, 6, 7)),
    (ReLU(), (3, 4)),
    (Sigmoid(), (5,)),
    (Tanh(), (5,)),
    (Flatten(), (2, 3, 2)),
    (MaxPool2d(2), (2, 4, 5)),
    (MaxPool2d(3, stride=1, padding=1), (2, 4, 4)),
    (MaxPool2d((2, 3), stride=2, ceil_mode=True), (1, 5, 6)),
    (LocalResponseNorm(3, alpha=0.7, beta=0.6, k=2.0), (5, 2, 2)),
    (LocalResponseNorm(4, alpha=0.7, beta=0.6, k=2.0), (5, 2, 2)),
]


def distance(a, b):
    """Norm of the difference over the norm of b, or over 1, the size of the inputs, if larger."""
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1.0)


def apart(shape, seed):
    """Numbers from -2 to 2, none equal and none near 0, so that no kink is within h."""
    count = int(np.prod(shape))
    values = (np.arange(count) + 0.5 - count // 2) * 4 / count
    return np.random.default_rng(seed).permutation(values).reshape(shape)


def problem(layer, shape, seed=0):
    """An example, parameters, and the error that comes back from above."""
    x = apart(shape, seed)
    parameters = {
        name: apart(size, seed + 1 + i) for i, (name, size) in enumerate(layer.shapes.items())
    }
    error = apart(layer.forward(x, parameters)[0].shape, seed + 9)
    return x, parameters, error


def central_differences(function, array, h=1e-5):
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        step = np.zeros_like(array)
        step[index] = h
        gradient[index] = (function(array + step) - function(array - step)) / (2 * h)
    return gradient


def discrepancy(layer, shape, seed=0):
    """Largest distance of backward from central differences, over input and parameters."""
    x, parameters, error = problem(layer, shape, seed)
    input_error, gradients = layer.backward(layer.forward(x, parameters)[1], error, parameters)
    assert list(gradients) == list(layer.shapes)

    def scalar(x, parameters):
        return np.sum(error * layer.forward(x, parameters)[0])

    actual = [distance(input_error, central_differences(lambda x: scalar(x, parameters), x))]
    for name, gradient in gradients.items():
        expected = central_differences(
            lambda w, name=name: scalar(x, parameters | {name: w}), parameters[name]
        )
        actual.append(distance(gradient, expected))
    return max(actual)


def in_torch(layer, x, parameters):
    """Run the layer in torch, on a batch of this example alone."""
    w, b = parameters.get("weight"), parameters.get("bias")
    match layer:
        case Dense():
            return F.linear(x, w, b)
        case Conv2d():
            return F.conv2d(x, w, b, layer.stride, layer.padding)
        case MaxPool2d():
            return F.max_pool2d(
                x, layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil_mode
            )
        case LocalResponseNorm():
            return F.local_response_norm(x, layer.size, layer.alpha, layer.beta, layer.k)
        case Flatten():
            return torch.flatten(x, start_dim=1)
    return {ReLU: torch.relu, Sigmoid: torch.sigmoid, Tanh: torch.tanh}[type(layer)](x)


def distance_from_torch(layer, shape, seed=0):
    """Largest distance of output, input error and gradients from torch."""
    x, parameters, error = problem(layer, shape, seed)
    output, stored = layer.forward(x, parameters)
    input_error, gradients = layer.backward(stored, error, parameters)
    tensors = {name: torch.tensor(w, requires_grad=True) for name, w in parameters.items()}
    tensor = torch.tensor(x[np.newaxis], requires_grad=True)
    expected = in_torch(layer, tensor, tensors)
    expected.backward(torch.tensor(error[np.newaxis]))
    assert output.shape == expected.shape[1:]
    return max(
        distance(output, expected[0].detach().numpy()),
        distance(input_error, tensor.grad[0].numpy()),
        *(distance(gradients[name], w.grad.numpy()) for name, w in tensors.items()),
    )


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=str)
def test_every_layer_agrees_with_central_differences(layer, shape):
    assert discrepancy(layer, shape) < 1e-8


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=str)
def test_every_layer_agrees_with_torch(layer, shape):
    assert distance_from_torch(layer, shape) < 1e-12


class DenseOfMeanActivation(Dense):
    def backward(self, stored, error, parameters):
        mean = np.full_like(stored["x"], stored["x"].mean())
        return super().backward({"x": mean}, error, parameters)


class Conv2dWithTheKernelTurned(Conv2d):
    def backward(self, stored, error, parameters):
        turned = parameters | {"weight": parameters["weight"][:, :, ::-1, ::-1]}
        _, gradients = super().backward(stored, error, parameters)
        return super().backward(stored, error, turned)[0], gradients


class MaxPool2dSplitOverTheWindow(MaxPool2d):
    def backward(self, stored, error, parameters):
        split = np.zeros(stored["shape"])
        for q, r, c in np.ndindex(error.shape):
            window = split[q][self.window(r, c)]
            window += error[q, r, c] / window.size
        return split, {}


class LocalResponseNormOfAConstantScale(LocalResponseNorm):
    def backward(self, stored, error, parameters):
        return error * stored["scale"] ** -self.beta, {}


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        (DenseOfMeanActivation(4, 3), (4,)),
        (Conv2dWithTheKernelTurned(2, 3, 3), (2, 5, 4)),
        (MaxPool2dSplitOverTheWindow(2), (2, 4, 5)),
        (LocalResponseNormOfAConstantScale(3, alpha=0.7, beta=0.6, k=2.0), (5, 2, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_both_oracles_catch_a_wrong_backward(wrong, shape):
    assert discrepancy(wrong, shape) > 0.01
    assert distance_from_torch(wrong, shape) > 0.01


@seeded_examples(25)
@given(
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_convolutions_of_any_geometry_agree_with_both_oracles(
    channels, size, kernel, stride, padding, seed
):
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    layer = Conv2d(*channels, kernel, stride, padding)
    shape = (channels[0], *size)
    assert distance_from_torch(layer, shape, seed) < 1e-12
    assert discrepancy(layer, shape, seed) < 1e-8


@seeded_examples(25)
@given(
    size=st.integers(1, 7),
    channels=st.integers(1, 6),
    alpha=st.floats(0.01, 2.0),
    beta=st.floats(0.1, 1.5),
    k=st.floats(0.5, 2.0),
)
def test_response_norms_of_any_window_agree_with_both_oracles(size, channels, alpha, beta, k):
    layer = LocalResponseNorm(size, alpha, beta, k)
    assert distance_from_torch(layer, (channels, 2, 1)) < 1e-12
    assert discrepancy(layer, (channels, 2, 1)) < 1e-8


def test_a_window_of_even_size_reaches_further_down_than_up():
    x = np.zeros((5, 1, 1))
    x[2] = 1.0
    scale = LocalResponseNorm(4, alpha=4.0, k=1.0).forward(x, {})[1]["scale"]
    # Channel c sees c - 2 to c + 1, so channel 2 is seen by 1, 2, 3 and 4.
    np.testing.assert_array_equal(scale.ravel(), [1, 2, 2, 2, 2])


def test_the_derivative_of_relu_at_zero_is_zero():
    layer = ReLU()
    _, stored = layer.forward(np.array([-1.0, 0.0, 1.0]), {})
    np.testing.assert_array_equal(layer.backward(stored, np.ones(3), {})[0], [0.0, 0.0, 1.0])


def test_sigmoid_does_not_overflow():
    y, _ = Sigmoid().forward(np.array([-1000.0, 0.0, 1000.0]), {})
    np.testing.assert_array_equal(y, [0.0, 0.5, 1.0])


OUTPUT = np.array([0.3, -1.2, 2.0, 0.7])
LOSSES = [
    (reference.SoftmaxCrossEntropy(), OUTPUT, 1),
    (reference.SquaredError(), OUTPUT, np.array([1.0, 0.5, -0.5, 0.6])),
    (reference.Output(), np.array([-0.7]), None),
]


def loss_discrepancy(loss, output, target):
    expected = central_differences(lambda y: loss.value(y, target), output)
    return distance(loss.error(output, target), expected)


@pytest.mark.parametrize(("loss", "output", "target"), LOSSES, ids=str)
def test_every_loss_agrees_with_central_differences(loss, output, target):
    assert loss_discrepancy(loss, output, target) < 1e-8


class SoftmaxWithoutTarget(reference.SoftmaxCrossEntropy):
    def error(self, output, target):
        return super().error(output, target) + np.eye(len(output))[target]


class HalfSquaredError(reference.SquaredError):
    def error(self, output, target):
        return super().error(output, target) / 2


@pytest.mark.parametrize(
    ("wrong", "target"), [(SoftmaxWithoutTarget(), 1), (HalfSquaredError(), np.zeros(4))]
)
def test_central_differences_catch_a_wrong_error_of_a_loss(wrong, target):
    assert loss_discrepancy(wrong, OUTPUT, target) > 0.01


@seeded_examples(50)
@given(
    output=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6).map(np.array),
    data=st.data(),
)
def test_losses_of_any_output_agree_with_torch(output, data):
    target = data.draw(st.integers(0, len(output) - 1))
    t = torch.tensor(output, requires_grad=True)
    expected = F.cross_entropy(t, torch.tensor(target))
    (error,) = torch.autograd.grad(expected, t)
    loss = reference.SoftmaxCrossEntropy()
    scale = max(1.0, abs(output).max())  # the difference of two outputs is rounded at their size
    assert loss.value(output, target) == pytest.approx(expected.item(), rel=0, abs=1e-13 * scale)
    np.testing.assert_allclose(
        loss.error(output, target), error.numpy(), rtol=0, atol=1e-13 * scale
    )

    expected = F.mse_loss(t, torch.zeros_like(t), reduction="sum")
    value = reference.SquaredError().value(output, np.zeros_like(output))
    assert value == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Dense(4, 3), (8, 4)),
        (Conv2d(2, 3, 3), (8, 2, 5, 4)),
        (Conv2d(2, 3, 3), (3, 5, 4)),
        (MaxPool2d(2), (8, 2, 4, 4)),
        (LocalResponseNorm(3), (8, 5, 2, 2)),
    ],
    ids=str,
)
def test_a_layer_refuses_a_batch_and_other_channels(layer, shape):
    parameters = {name: np.zeros(size) for name, size in layer.shapes.items()}
    with pytest.raises(ValueError, match=r"got an input of shape .* One example has"):
        layer.forward(np.zeros(shape), parameters)


def test_a_convolution_without_output_is_refused():
    layer = Conv2d(1, 1, 4)
    with pytest.raises(ValueError, match=r"kernel larger than its padded input of \(3, 9\)"):
        layer.forward(np.zeros((1, 3, 9)), {"weight": np.zeros((1, 1, 4, 4)), "bias": np.zeros(1)})


@pytest.mark.parametrize("target", [4, -1, 1.0, np.eye(4)[1]], ids=str)
def test_cross_entropy_takes_nothing_but_a_class(target):
    with pytest.raises(ValueError, match=r"vector of outputs and the number of a class"):
        reference.SoftmaxCrossEntropy().value(OUTPUT, target)


def test_squared_error_does_not_broadcast():
    with pytest.raises(ValueError, match=r"target of shape \(1,\) .* shape \(4,\)"):
        reference.SquaredError().error(OUTPUT, np.zeros(1))


def test_the_output_is_a_loss_only_if_it_is_one_number():
    with pytest.raises(ValueError, match=r"an output of shape \(4,\)"):
        reference.Output().value(OUTPUT, None)
