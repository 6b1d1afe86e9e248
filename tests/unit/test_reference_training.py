"""Training loop of the reference, and what it imports.

Oracle: the same network, penalty and updates in torch, over whole batches in float64.
20 updates, each rounded otherwise at 1e-16, stay within 1e-12 of the norm.
"""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anybatch import reference
from anybatch.reference import (
    L2,
    SGD,
    Dense,
    Momentum,
    Network,
    SoftmaxCrossEntropy,
    SquaredError,
    Tanh,
    cut,
    flatten,
    measure_accuracy,
    train,
)

LOSS = SoftmaxCrossEntropy()
LAYERS = (Dense(2, 6), Tanh(), Dense(6, 3))
GENERATOR = np.random.default_rng(0)
CLASSES = GENERATOR.integers(0, 3, size=50)
INPUTS = np.array([[-2.0, -1.0], [2.0, -1.0], [0.0, 2.0]])[CLASSES]
INPUTS = INPUTS + 0.5 * GENERATOR.normal(size=INPUTS.shape)


def in_torch():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def network():
    parameters = [
        {name: p.detach().numpy() for name, p in module.named_parameters()} for module in in_torch()
    ]
    return Network(LAYERS, parameters)


def epochs(count, batch_size=15):
    for _ in range(count):
        yield from cut(INPUTS, CLASSES, batch_size)


def train_in_torch(divisor=None):
    """5 epochs of 4 batches, the last of 5 examples; each divided by its own size by default."""
    model = in_torch()
    weights = [model[0].weight, model[2].weight]
    biases = [model[0].bias, model[2].bias]
    groups = [{"params": weights, "weight_decay": 0.02}, {"params": biases}]
    optimiser = torch.optim.SGD(groups, lr=0.3, momentum=0.8)
    for inputs, classes in epochs(5):
        outputs = model(torch.tensor(inputs))
        summed = nn.functional.cross_entropy(outputs, torch.tensor(classes), reduction="sum")
        optimiser.zero_grad()
        (summed / (divisor or len(inputs))).backward()
        optimiser.step()
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def train_reference():
    steps = list(train(network(), LOSS, epochs(5), Momentum(0.3, 0.8), penalty=L2(0.02)))
    assert [step.number for step in steps] == list(range(20))
    return flatten(steps[-1].network.parameters)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_training_follows_torch_through_short_last_batches():
    assert distance(train_reference(), train_in_torch()) < 1e-12


def test_the_oracle_catches_a_last_batch_divided_by_the_full_batch_size():
    assert distance(train_reference(), train_in_torch(divisor=15)) > 0.01


def test_the_caller_stops_when_the_accuracy_is_reached():
    asked_for = 0
    assert measure_accuracy(network(), INPUTS, CLASSES) < 0.9
    for step in train(network(), LOSS, epochs(100), SGD(0.5)):
        asked_for += 1
        if measure_accuracy(step.network, INPUTS, CLASSES) >= 0.9:
            break
    assert 0 < asked_for < 400
    with torch.no_grad():
        model = in_torch()
        model.load_state_dict(
            {n: torch.tensor(a) for n, a in reference.name_arrays(step.network.parameters).items()}
        )
        right = (model(torch.tensor(INPUTS)).argmax(1).numpy() == CLASSES).mean()
    assert measure_accuracy(step.network, INPUTS, CLASSES) == right


def test_the_sum_at_a_rate_divided_by_the_batch_size_takes_the_same_path():
    def path(optimiser, **options):
        steps = train(network(), LOSS, epochs(4, batch_size=10), optimiser, **options)
        return np.array([flatten(step.network.parameters) for step in steps])

    mean = path(SGD(0.5))
    assert distance(path(SGD(0.05), reduction="sum"), mean) < 1e-12
    assert distance(path(SGD(0.5), reduction="sum"), mean) > 0.01  # the rate not converted
    # A penalty has a scale of its own: it must be multiplied by the batch size.
    mean = path(SGD(0.5), penalty=L2(0.1))
    assert distance(path(SGD(0.05), reduction="sum", penalty=L2(1.0)), mean) < 1e-12
    assert distance(path(SGD(0.05), reduction="sum", penalty=L2(0.1)), mean) > 0.01


def test_one_update_a_batch_and_none_in_between():
    first, second = list(train(network(), LOSS, epochs(1, batch_size=25), SGD(0.5)))
    np.testing.assert_array_equal(
        flatten(first.network.parameters),
        flatten(network().parameters) - 0.5 * flatten(first.gradient.gradients),
    )
    outputs = [first.network.forward(x)[0] for x in INPUTS[25:]]
    for example, output in zip(second.gradient.examples, outputs, strict=True):
        np.testing.assert_array_equal(example.output, output)


def test_training_leaves_the_network_it_was_given():
    argument = network()
    list(train(argument, LOSS, epochs(1), Momentum(0.5)))
    np.testing.assert_array_equal(flatten(argument.parameters), flatten(network().parameters))


def test_batches_cover_the_data_in_order_and_the_last_may_be_smaller():
    batches = list(cut(INPUTS, CLASSES, 15))
    assert [len(inputs) for inputs, _ in batches] == [15, 15, 15, 5]
    np.testing.assert_array_equal(np.concatenate([inputs for inputs, _ in batches]), INPUTS)
    np.testing.assert_array_equal(np.concatenate([classes for _, classes in batches]), CLASSES)


def test_steps_that_are_too_large_are_reported():
    line = Network([Dense(1, 1, bias=False)], [{"weight": np.array([[1.0]])}])
    batches = [([[1.0]], [[0.0]])] * 1000
    settled = list(train(line, SquaredError(), batches, SGD(0.9)))  # w <- (1 - 1.8) w
    assert settled[-1].gradient.loss < 1e-100
    with pytest.raises(FloatingPointError, match=r"loss at update \d+ is inf.*SGD\(lr=2\.0\)"):
        list(train(line, SquaredError(), batches, SGD(2.0)))  # w <- (1 - 4) w


def test_the_learning_rate_can_change_while_the_state_stays():
    optimiser, g = Momentum(0.1, 0.9), [{"weight": np.array([0.5])}]
    state, w = optimiser.update(optimiser.start(g), g, [{"weight": np.array([1.0])}])
    _, w = replace(optimiser, lr=0.01).update(state, g, w)
    assert flatten(w) == pytest.approx([0.95 - 0.01 * 0.95], rel=1e-15)


# What it rests on.


def foreign_imports(source):
    """Return what a module imports besides NumPy, the standard library and the reference itself."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return [
        name
        for name in names
        if name.split(".")[0] not in sys.stdlib_module_names | {"numpy"}
        and not name.startswith("anybatch.reference")
    ]


def test_the_reference_rests_on_numpy_alone():
    modules = list(Path(reference.__file__).parent.glob("*.py"))
    assert len(modules) > 5
    for module in modules:
        assert foreign_imports(module.read_text()) == []


def test_a_foreign_import_would_be_seen():
    source = "import torch.nn\nfrom anybatch.gradient import x\nfrom .. import y\nimport math\n"
    assert foreign_imports(source) == ["torch.nn", "anybatch.gradient", ".."]


def test_every_public_name_exists_and_is_listed_once():
    assert all(hasattr(reference, name) for name in reference.__all__)
    assert len(set(reference.__all__)) == len(reference.__all__)
