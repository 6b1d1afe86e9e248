"""Check that whole trainings follow the item-by-item method, with torch's optimisers.

Oracle: `anybatch.reference`, NumPy alone, an example at a time. Tolerance: 1e-10 as the norm of
the difference over the norm after 50 updates in float64; each update rounds at about 1e-16, and
these runs neither diverge nor amplify it by more than some thousand.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch import reference

BOUND, UPDATES, BATCH = 1e-10, 50, 6
LAYOUTS = [ab.Layout(), ab.Layout(1), ab.Layout(4), ab.Layout((1, 5))]
OPTIMISERS = {
    "sgd": (reference.SGD(0.1), torch.optim.SGD, {"lr": 0.1}),
    "momentum": (reference.Momentum(0.05), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (
        reference.Nesterov(0.05),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    ),
    "adagrad": (reference.Adagrad(0.05), torch.optim.Adagrad, {"lr": 0.05}),
    "rmsprop": (reference.RMSProp(0.005), torch.optim.RMSprop, {"lr": 0.005}),
    "adam": (reference.Adam(0.01), torch.optim.Adam, {"lr": 0.01}),
    "adamw": (
        reference.AdamW(0.01, weight_decay=0.1),
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1},
    ),
}


def perceptron():
    layers = [reference.Dense(6, 5), reference.Tanh(), reference.Dense(5, 3)]
    return layers, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), (6,)


def lenet():
    """Convolutions, pooling that overlaps and one that rounds up, response normalisation."""
    layers = [
        reference.Conv2d(1, 3, 3, padding=1),
        reference.MaxPool2d(3, 2),
        reference.LocalResponseNorm(3, alpha=0.5),
        reference.Conv2d(3, 2, 3, padding=1),
        reference.ReLU(),
        reference.MaxPool2d(2, ceil_mode=True),
        reference.Flatten(),
        reference.Dense(8, 3),
    ]
    twin = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.MaxPool2d(3, 2),
        nn.LocalResponseNorm(3, alpha=0.5),
        nn.Conv2d(3, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return layers, twin.double(), (1, 7, 7)


def start(build, seed=0):
    """A reference network, a model with the same weights, and the data of all updates."""
    torch.manual_seed(seed)
    layers, model, shape = build()
    parameters = [
        {name: p.detach().numpy() for name, p in layer.named_parameters()} for layer in model
    ]
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(UPDATES * BATCH, *shape))
    return reference.Network(layers, parameters), model, inputs, rng.integers(3, size=len(inputs))


def cross_entropy(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")


def distance(network, model):
    expected = reference.flatten(network.parameters)
    result = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)


def train_model(build, optimiser, reduction="mean", penalty=None):
    """Return the reference's last network, after one update per batch."""
    network, _, inputs, targets = start(build)
    batches = reference.cut(inputs, targets, BATCH)
    loss = reference.SoftmaxCrossEntropy()
    run = reference.train(network, loss, batches, optimiser, reduction=reduction, penalty=penalty)
    *_, last = run
    assert last.number == UPDATES - 1
    return last.network


def follow(build, optimizer, options, reduction=ab.Mean(), penalty=None, layouts=LAYOUTS):  # noqa: B008
    """Return the engine's model after the same batches, with another layout at each update."""
    _, model, inputs, targets = start(build)
    steps = optimizer(model.parameters(), **options)
    objective = ab.Objective(cross_entropy, reduction, penalty)
    for update, (x, t) in enumerate(reference.cut(inputs, targets, BATCH)):
        share = torch.as_tensor(x), torch.as_tensor(t)
        ab.batch_gradient(model, objective, share, layout=layouts[update % len(layouts)])
        steps.step()
    return model


@pytest.mark.fast(3)
@pytest.mark.parametrize("build", [perceptron, lenet])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_fifty_updates_of_every_optimiser_follow_the_reference(name, build):
    optimiser, optimizer, options = OPTIMISERS[name]
    assert distance(train_model(build, optimiser), follow(build, optimizer, options)) < BOUND


@pytest.mark.parametrize(("reduction", "lr"), [("mean", 0.1), ("sum", 0.1 / BATCH)])
@pytest.mark.parametrize("build", [perceptron, lenet])
def test_penalties_under_mean_and_sum_follow_the_reference(build, reduction, lr):
    both = reference.L2(0.05) + reference.L1(0.01, on=("*.bias", "0.weight"))
    network = train_model(build, reference.Momentum(lr), reduction, both)
    model = follow(
        build,
        torch.optim.SGD,
        {"lr": lr, "momentum": 0.9},
        {"mean": ab.Mean(), "sum": ab.Sum()}[reduction],
        ab.L2(0.05) + ab.L1(0.01, on=("*.bias", "0.weight")),
    )
    assert distance(network, model) < BOUND


@pytest.mark.parametrize(
    ("optimizer", "options", "reduction", "penalty"),
    [
        (torch.optim.SGD, {"lr": 0.1}, ab.Sum(), None),
        (torch.optim.SGD, {"lr": 0.1}, ab.Mean(), ab.L2(1e-6)),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 1e-6}, ab.Mean(), None),
    ],
    ids=["sum for mean", "a penalty of 1e-6", "a momentum of 1e-6"],
)
def test_the_comparison_catches_a_run_that_is_another(optimizer, options, reduction, penalty):
    network = train_model(lenet, reference.SGD(0.1))
    model = follow(lenet, optimizer, options, reduction, penalty)
    assert distance(network, model) > 100 * BOUND


def test_every_example_of_the_engine_finds_the_winners_of_the_reference():
    network, model, inputs, targets = start(lenet)
    inputs, targets = inputs[:BATCH], targets[:BATCH]
    model[1].return_indices, history = True, []
    model[1].register_forward_hook(lambda module, inputs, out: history.append(out[1]) or out[0])
    share = torch.as_tensor(inputs), torch.as_tensor(targets)
    ab.batch_gradient(model, ab.Objective(cross_entropy), share, layout=ab.Layout(4))
    each = reference.batch_gradient(network, reference.SoftmaxCrossEntropy(), inputs, targets)
    winners = np.stack([example.stored[1]["winners"] for example in each.examples])
    assert np.array_equal(torch.cat(history).numpy(), winners)
    assert (winners != winners[0]).any()  # or it would not matter whose winners they are
    result = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
    expected = reference.flatten(each.gradients)
    assert np.linalg.norm(result - expected) < 1e-12 * np.linalg.norm(expected)
