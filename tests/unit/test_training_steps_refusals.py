"""Refusals of `steps` leave the weights unchanged; some similar cases are allowed."""

import copy

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import DivergenceError, ModelError, OrderError, RunError
from nested_states import same
from small_training import train_small
from training_by_hand import data, example_losses, groups, network, run, sgd, weights


def test_a_loss_that_is_nan_only_at_an_augmentation_is_found_and_named():
    def transform(example, key):
        inputs, target = example
        bad = (key.epoch, key.id) == (1, 5)
        return inputs * (torch.nan if bad else 1), target

    model, ends = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def body(step):
        ends.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))

    message = r"Not finite for 1 of \d examples, by id: 5\. Look at these examples for NaN"
    with pytest.raises(DivergenceError, match=message):
        run(model, optimizer, epochs=2, transform=transform, body=body, clip=ab.ClipNorm(1.0))
    assert 3 <= len(ends) < 6
    assert same((model.state_dict(), optimizer.state_dict()), ends[-1])


def test_a_penalty_that_overflows_is_refused_before_the_update():
    model = network().float()
    optimizer = sgd(model)
    with torch.no_grad():
        model[0].weight.fill_(-1e20)  # tanh keeps the loss finite; the square is not
    before = weights(model)
    inputs, targets = data()
    objective = ab.Objective(example_losses, penalty=ab.L2(0.1))
    with pytest.raises(DivergenceError, match=r"loss of step 0 is inf.*'L2': inf.* Lower the"):
        run(model, optimizer, objective=objective, data=(inputs.float(), targets))
    assert torch.equal(weights(model), before)


def over_others(model):
    return torch.optim.SGD(network().parameters(), lr=0.1)


def over_more(model):
    return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(()))], lr=0.1)


def by_groups_alone(model):
    return torch.optim.SGD([{**group, "lr": 0.1} for group in groups(model)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (over_others, "SGD holds 4 of 4 parameters that are not the model's"),
        (over_more, "SGD holds 1 of 5 parameters that are not the model's"),
        (by_groups_alone, r"default rate of SGD, 0.001, .* rates are \[0.1, 0.1\]"),
        (lambda model: torch.optim.SGD(groups(model), lr=0.0), "default rate of SGD, 0.0, "),
    ],
)
def test_an_optimiser_that_does_not_fit_is_refused(tmp_path, make, message):
    model = network()
    before = weights(model)
    with pytest.raises(ModelError, match=message):
        run(model, make(model), schedule=ab.Constant(0.1), run=tmp_path / "run")
    assert torch.equal(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_rates_given_by_group_alone_are_fine_without_a_schedule():
    model = network()
    plain = network()
    expected = run(plain, sgd(plain))
    assert torch.equal(run(model, by_groups_alone(model)), expected)


def test_an_optimiser_over_some_of_the_models_parameters_trains_these():
    model = network()
    before = model[0].weight.clone()
    run(model, torch.optim.SGD(model[3].parameters(), lr=0.1))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        (0, "0 epochs of this order make no update"),
        (-1, "epochs is -1. It must be at least 0"),
        (1.5, "epochs is 1.5 of type float. It must be an integer"),
        (True, "epochs is True of type bool"),
    ],
)
def test_epochs_are_whole_and_at_least_one(tmp_path, epochs, message):
    model = network()
    optimizer = sgd(model)
    with pytest.raises(OrderError, match=message):
        run(model, optimizer, epochs=epochs, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_without_a_run_has_nowhere_to_be_saved():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(RunError, match=r"step.save\(\) has nowhere to write"):
        run(model, optimizer, body=lambda step: step.save())


def test_an_earlier_step_cannot_be_saved_under_its_number(tmp_path):
    saved_steps = []

    def body(_, step):
        saved_steps.append(step)
        saved_steps[0].save()

    with pytest.raises(RunError, match=r"step 0 cannot be saved any more.* after 2 updates by now"):
        train_small(tmp_path, body)
