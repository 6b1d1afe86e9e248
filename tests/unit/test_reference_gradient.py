"""Gradient of a batch in the reference, example by example.

Oracle: torch autograd of the reduced loss over the whole batch at once, in float64, on
nn.Sequential with the same weights; it never sees an example alone. It adds in another
order, so 1e-12 of the norm is asked for. Each wrong way to treat a batch must be off by
more than 0.01 of the norm. Worked figures have one decimal and are compared to 1e-15.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anybatch.reference import (
    L1,
    L2,
    SGD,
    Conv2d,
    Dense,
    Flatten,
    MaxPool2d,
    Network,
    Output,
    SoftmaxCrossEntropy,
    SquaredError,
    Tanh,
    add_up,
    batch_gradient,
    draw_parameters,
    elementwise,
    example_gradient,
    flatten,
    name_arrays,
)
from properties import seeded_examples

LOSS = SoftmaxCrossEntropy()
POOL = 2  # index of the pooling layer
LAYERS = (Conv2d(1, 3, 3, padding=1), Tanh(), MaxPool2d(2), Flatten(), Dense(27, 4))
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(8, 1, 6, 6))
CLASSES = GENERATOR.integers(0, 4, size=8)


def in_torch():
    torch.manual_seed(0)
    pooled = nn.MaxPool2d(2)
    convolution = nn.Conv2d(1, 3, 3, padding=1)
    return nn.Sequential(convolution, nn.Tanh(), pooled, nn.Flatten(), nn.Linear(27, 4)).double()


def parameters_of(sequential):
    return [
        {name: p.detach().double().numpy() for name, p in module.named_parameters()}
        for module in sequential
    ]


def network():
    return Network(LAYERS, parameters_of(in_torch()))


def oracle(reduction="mean", penalty=None):
    """Loss and flat gradient by autograd over the batch."""
    sequential = in_torch()
    loss = nn.functional.cross_entropy(
        sequential(torch.tensor(INPUTS)), torch.tensor(CLASSES), reduction=reduction
    )
    if penalty is not None:
        loss = loss + penalty(sequential)
    loss.backward()
    return loss.item(), np.concatenate([p.grad.numpy().ravel() for p in sequential.parameters()])


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# The worked figures of one update: losses g_i . w, which may be negative.

FIGURES = np.array([[1.5, -2.0, 1.1, 0.4, -0.9], [1.2, 2.3, -1.1, -0.8, -0.7]])
LINEAR = Network([Dense(5, 1, bias=False)], [{"weight": np.array([[0, 0, 0, 3.2, -0.8]])}])
exactly = {"rtol": 0, "atol": 1e-15}


def test_the_gradients_of_two_examples_average_to_the_worked_figures():
    gradient = batch_gradient(LINEAR, Output(), FIGURES, [None, None])
    for example, figures in zip(gradient.example_gradients, FIGURES, strict=True):
        np.testing.assert_array_equal(flatten(example), figures)
    mean = [1.35, 0.15, 0, -0.2, -0.8]
    np.testing.assert_allclose(flatten(gradient.gradients), mean, **exactly)


def test_losses_of_two_and_minus_two_cancel_and_their_gradients_do_not():
    gradient = batch_gradient(LINEAR, Output(), FIGURES, [None, None])
    np.testing.assert_allclose(gradient.example_losses, [2, -2], **exactly)
    assert gradient.loss == pytest.approx(0, abs=1e-15)
    assert np.linalg.norm(flatten(gradient.gradients)) > 1


def test_one_step_moves_the_weights_to_the_worked_figures():
    gradient = batch_gradient(LINEAR, Output(), FIGURES, [None, None])
    _, parameters = SGD(0.1).update(None, gradient.gradients, LINEAR.parameters)
    np.testing.assert_allclose(flatten(parameters), [-0.135, -0.015, 0, 3.22, -0.72], **exactly)
    assert flatten(parameters)[2] == 0  # its average gradient is 0, and it stays where it is


def test_residuals_of_two_and_minus_two_do_not_cancel_in_a_squared_error():
    line = Network([Dense(1, 1, bias=False)], [{"weight": np.array([[3.0]])}])
    gradient = batch_gradient(line, SquaredError(), [[1.0], [1.0]], [[1.0], [5.0]])
    np.testing.assert_array_equal(gradient.example_losses, [4, 4])
    assert gradient.loss == 4
    # The gradients, 4 and -4, do cancel: w = 3 is the mean of the targets, and the minimum.
    assert flatten(gradient.gradients) == 0


# The right gradient.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_the_reduced_loss_is_the_reduced_gradient(reduction):
    loss, expected = oracle(reduction)
    gradient = batch_gradient(network(), LOSS, INPUTS, CLASSES, reduction=reduction)
    assert gradient.loss == pytest.approx(loss, rel=1e-12)
    assert distance(flatten(gradient.gradients), expected) < 1e-12


def test_the_error_of_the_input_is_that_of_each_example_alone():
    inputs = torch.tensor(INPUTS, requires_grad=True)
    loss = nn.functional.cross_entropy(in_torch()(inputs), torch.tensor(CLASSES), reduction="sum")
    loss.backward()
    gradient = batch_gradient(network(), LOSS, INPUTS, CLASSES)
    errors = np.array([example.input_error for example in gradient.examples])
    assert distance(errors, inputs.grad.numpy()) < 1e-12


def test_penalties_enter_once_and_are_visible_apart():
    def in_words(sequential):
        first, last = sequential[0].weight, sequential[4].weight
        return 0.15 * (first**2).sum() + 0.15 * (last**2).sum() + 0.2 * last.abs().sum()

    penalty = L2(0.3) + L1(0.2, on=("4.weight",))
    for reduction in ("mean", "sum"):
        loss, expected = oracle(reduction, in_words)
        gradient = batch_gradient(
            network(), LOSS, INPUTS, CLASSES, reduction=reduction, penalty=penalty
        )
        assert gradient.loss == pytest.approx(loss, rel=1e-12)
        assert distance(flatten(gradient.gradients), expected) < 1e-12
        assert gradient.parts["data"] == pytest.approx(oracle(reduction)[0], rel=1e-12)
        assert gradient.parts["penalty"] == pytest.approx(loss - oracle(reduction)[0], rel=1e-12)


@seeded_examples(10)
@given(batch_examples=st.integers(1, 8))
def test_the_sum_is_the_mean_times_the_number_of_examples(batch_examples):
    batch = INPUTS[:batch_examples], CLASSES[:batch_examples]
    mean = batch_gradient(network(), LOSS, *batch)
    summed = batch_gradient(network(), LOSS, *batch, reduction="sum")
    assert summed.loss == pytest.approx(batch_examples * mean.loss, rel=1e-15)
    # One division is undone: one rounding.
    assert distance(flatten(summed.gradients), batch_examples * flatten(mean.gradients)) < 1e-15


# Wrong ways to treat a batch, each of which the oracle must tell from the right one.


def last_example_alone(network):
    return example_gradient(network, LOSS, INPUTS[-1], CLASSES[-1]).gradients


def mean_of_micro_batch_means(network, cuts):
    parts = zip(np.split(INPUTS, cuts), np.split(CLASSES, cuts), strict=True)
    means = [batch_gradient(network, LOSS, x, t).gradients for x, t in parts]
    return elementwise(lambda array: array / len(means), add_up(means))


def mean_error_times_mean_activation(network):
    """One backward pass with what the examples stored and their errors, averaged beforehand."""
    passes = [network.forward(x) for x in INPUTS]
    error = np.mean([LOSS.error(y, t) for (y, _), t in zip(passes, CLASSES, strict=True)], axis=0)
    stored = [
        {
            name: np.mean([copied[index][name] for _, copied in passes], axis=0).astype(array.dtype)
            for name, array in layer.items()
        }
        for index, layer in enumerate(passes[0][1])
    ]
    return network.backward(stored, error)[1]


def split_over_the_winners_of_the_batch(network):
    """Each example's error goes, in equal parts, to what won for any example."""
    lower = Network(network.layers[:POOL], network.parameters[:POOL])
    upper = Network(network.layers[POOL + 1 :], network.parameters[POOL + 1 :])
    passes = [network.forward(x) for x in INPUTS]
    gradients = []
    for (y, stored), target in zip(passes, CLASSES, strict=True):
        error, above = upper.backward(stored[POOL + 1 :], LOSS.error(y, target))
        routed = [network.layers[POOL].backward(copied[POOL], error, {})[0] for _, copied in passes]
        _, below = lower.backward(stored[:POOL], np.mean(routed, axis=0))
        gradients.append([*below, {}, *above])
    return elementwise(lambda array: array / len(INPUTS), add_up(gradients))


@pytest.mark.parametrize(
    "wrong",
    [
        last_example_alone,
        mean_error_times_mean_activation,
        split_over_the_winners_of_the_batch,
        lambda network: mean_of_micro_batch_means(network, cuts=[6]),
    ],
    ids=["last example", "mean activation", "split winners", "mean of unequal means"],
)
def test_the_oracle_tells_the_wrong_ways_from_the_right_one(wrong):
    assert distance(flatten(wrong(network())), oracle()[1]) > 0.01


def test_a_mean_of_means_is_right_as_long_as_the_micro_batches_are_equal():
    assert distance(flatten(mean_of_micro_batch_means(network(), cuts=[4])), oracle()[1]) < 1e-12


def test_the_oracle_catches_a_penalty_that_every_micro_batch_adds():
    penalty = L2(0.3)
    halves = [
        batch_gradient(
            network(), LOSS, INPUTS[part], CLASSES[part], reduction="sum", penalty=penalty
        ).gradients
        for part in (slice(0, 4), slice(4, 8))
    ]
    _, expected = oracle(
        "sum", lambda s: 0.15 * ((s[0].weight ** 2).sum() + (s[4].weight ** 2).sum())
    )
    assert distance(flatten(add_up(halves)), expected) > 0.01


# Noise.


def squared_deviations(num_batches, batch_examples, reduction="mean"):
    """|g_B - g|^2 of batches drawn with replacement, and tr(S), for a linear model."""
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(64, 3))
    targets = inputs @ [[1.0], [-2.0], [0.5]] + generator.normal(size=(64, 1))
    model = Network([Dense(3, 1)], draw_parameters([Dense(3, 1)], seed=0))
    whole = batch_gradient(model, SquaredError(), inputs, targets)
    each = np.array([flatten(g) for g in whole.example_gradients])
    trace = np.sum(each.var(axis=0))
    draws = generator.integers(0, 64, size=(num_batches, batch_examples))
    deviations = [
        flatten(
            batch_gradient(
                model, SquaredError(), inputs[d], targets[d], reduction=reduction
            ).gradients
        )
        - flatten(whole.gradients)
        for d in draws
    ]
    return np.sum(np.square(deviations), axis=1), trace


@pytest.mark.parametrize("batch_examples", [1, 4, 16])
def test_the_variance_of_the_gradient_falls_as_one_over_the_batch_size(batch_examples):
    squares, trace = squared_deviations(1000, batch_examples)
    # The mean of |g_B - g|^2 estimates tr(S) / B without bias. 4 standard errors: a chance of
    # 6e-5 for honest code, and the draws are seeded.
    interval = 4 * squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - trace / batch_examples) < interval
    # The interval excludes no fall and a fall as 1 / sqrt(B).
    assert interval < trace / batch_examples * 0.4
    if batch_examples > 1:
        assert abs(squares.mean() - trace / np.sqrt(batch_examples)) > interval


def test_the_measured_variance_tells_a_sum_from_a_mean():
    squares, trace = squared_deviations(100, 16, reduction="sum")
    interval = 4 * squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - trace / 16) > interval


# What a learner sees, and what is refused.


def test_every_example_shows_what_it_passed_through():
    gradient = batch_gradient(network(), LOSS, INPUTS, CLASSES)
    _, indices = nn.functional.max_pool2d(
        in_torch()[:POOL](torch.tensor(INPUTS)), 2, return_indices=True
    )
    for example, expected, x in zip(gradient.examples, indices, INPUTS, strict=True):
        np.testing.assert_array_equal(example.stored[POOL]["winners"], expected)
        np.testing.assert_array_equal(example.output, network().forward(x)[0])


def test_names_are_those_of_a_sequential():
    expected = {name: tuple(p.shape) for name, p in in_torch().named_parameters()}
    assert {
        name: array.shape for name, array in name_arrays(network().parameters).items()
    } == expected


def test_a_network_keeps_its_numbers_when_the_torch_module_moves_on():
    sequential = in_torch()
    copied = Network(LAYERS, parameters_of(sequential))
    with torch.no_grad():
        sequential[4].bias.add_(1.0)
    np.testing.assert_array_equal(copied.parameters[4]["bias"], in_torch()[4].bias.detach())


def test_initial_parameters_lie_within_the_bound_and_repeat():
    samples = draw_parameters(LAYERS, seed=3)
    assert 0.5 / 3 < abs(samples[0]["weight"]).max() <= 1 / 3  # 9 inputs
    np.testing.assert_array_equal(flatten(samples), flatten(draw_parameters(LAYERS, seed=3)))
    assert np.all(flatten(samples) != flatten(draw_parameters(LAYERS, seed=4)))


@pytest.mark.parametrize(("inputs", "targets"), [([], []), (INPUTS, CLASSES[:7])], ids=len)
def test_an_empty_batch_and_missing_targets_are_refused(inputs, targets):
    with pytest.raises(ValueError, match=f"has {len(inputs)} inputs and {len(targets)} targets"):
        batch_gradient(network(), LOSS, inputs, targets)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"reduction is 'average'. It must be 'mean' or 'sum'"):
        batch_gradient(network(), LOSS, INPUTS, CLASSES, reduction="average")


def test_a_penalty_on_nothing_is_refused():
    with pytest.raises(ValueError, match=r"pattern 'fc\.\*' matches none of .*'0\.weight'"):
        batch_gradient(network(), LOSS, INPUTS, CLASSES, penalty=L2(0.1, on=("fc.*",)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "1 layers and 0 dictionaries of parameters"),
        ([{"weight": np.zeros((3, 2))}], r"Layer 0, .* It needs .*\(2, 3\)"),
        ([{"weight": np.zeros((2, 3), np.float32)}], r"has the parameters .*float32.*\.double\(\)"),
        ([{}], "Layer 0, .* It needs .*'weight'"),
    ],
)
def test_parameters_that_do_not_fit_the_layers_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        Network([Dense(3, 2, bias=False)], parameters)
