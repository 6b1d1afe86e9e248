"""Moving averages of the weights.

Oracle: the closed form a_n = d^n w_0 + (1 - d) sum_k d^(n-k) w_k in NumPy float64, from the
weights noted after each update; the library goes from each average to the next.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError, RecipeError, RunError
from training_by_hand import OBJECTIVE, ORDER, data, network, sgd, weights

ROUNDING = 1e-14  # relative: a dozen roundings of float64


class Left(Exception):
    """Error that ends the body of a loop early."""


def average_weights(average, model, body=lambda model, step: None, **options):
    """Train, and note the weights after each update."""
    noted = []
    for step in ab.steps(
        model,
        OBJECTIVE,
        sgd(model),
        data(),
        order=ORDER,
        epochs=4,
        state={"average": average},
        **options,
    ):
        average.update(model)
        noted.append(weights(model).numpy().copy())
        body(model, step)
    return noted


def closed_form(first, noted, decays):
    """Compute the oracle: the sum of all weights so far, each times the decays since."""
    total = np.prod(decays) * first
    for k, w in enumerate(noted):
        total = total + (1 - decays[k]) * np.prod(decays[k + 1 :]) * w
    return total


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def weights_of(average, model):
    with average.swapped(model):
        return weights(model).numpy().copy()


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_an_average_is_the_weighted_sum_of_the_weights_after_each_update(decay):
    model = network()
    first, average = weights(model).numpy().copy(), ab.Average(model, decay)
    noted = average_weights(average, model)
    assert len(noted) == 12
    assert distance(weights_of(average, model), closed_form(first, noted, [decay] * 12)) < ROUNDING


@pytest.mark.parametrize("decay", [0.25, 0.999])
def test_with_warm_up_the_decay_is_at_most_that_of_the_number_of_updates(decay):
    model = network()
    first, average = weights(model).numpy().copy(), ab.Average(model, decay, warm_up=True)
    noted = average_weights(average, model)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, 13)]  # 2/11 after the first update
    assert distance(weights_of(average, model), closed_form(first, noted, decays)) < ROUNDING


def test_the_closed_form_tells_the_classic_mistakes_apart():  # the control
    model = network()
    first, average = weights(model).numpy().copy(), ab.Average(model, 0.9)
    noted = average_weights(average, model)
    got = weights_of(average, model)
    before = [first, *noted[:-1]]  # the weights before each update
    from_zero = [min(0.999, (1 + n) / (10 + n)) for n in range(12)]
    assert distance(got, closed_form(first, noted, [0.1] * 12)) > 1e-3
    assert distance(got, closed_form(0 * first, noted, [0.9] * 12)) > 1e-3
    assert distance(got, closed_form(first, before, [0.9] * 12)) > 1e-3
    assert distance(closed_form(first, noted, from_zero), got) > 1e-3


def test_swapping_leaves_every_bit_as_it_was_also_after_an_error():
    model = nn.Sequential(network(), nn.BatchNorm1d(3, dtype=torch.float64))
    average = ab.Average(model, 0.5)
    model(torch.randn(4, 5, dtype=torch.float64))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    inside = {}

    def failing():
        with average.swapped(model):
            inside.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            model[1].running_mean.add_(1)
            raise Left("on the way")

    with pytest.raises(Left, match="on the way"):
        failing()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == where
    changed = {name for name in before if not torch.equal(inside[name], before[name])}
    assert changed >= {"0.0.weight", "0.3.bias", "1.running_mean", "1.num_batches_tracked"}


def test_training_is_the_same_whether_the_average_is_evaluated_or_not():
    def evaluating(model, step):
        if step.ends_epoch:
            with average.swapped(model):
                ab.evaluate(model, OBJECTIVE, data())

    model, watched = network(), network()
    plain = average_weights(ab.Average(model, 0.9), model)
    average = ab.Average(watched, 0.9)
    assert all(map(np.array_equal, average_weights(average, watched, evaluating), plain))


def test_buffers_and_integers_are_copied_and_frozen_weights_keep_their_bits():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    model.register_parameter("index", nn.Parameter(torch.tensor([7]), requires_grad=False))
    average = ab.Average(model, 0.7)
    frozen = model[0].weight.clone()
    for _ in range(50):
        model(torch.randn(4, 3))
        average.update(model)
    running = model[1].running_mean.clone()
    with average.swapped(model):
        assert torch.equal(model[0].weight, frozen)
        assert torch.equal(model[1].running_mean, running)
        assert (model[1].num_batches_tracked.item(), model.index.item()) == (50, 7)


def test_an_average_of_narrow_weights_moves_by_less_than_they_can_tell():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    average = ab.Average(model, 0.999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(693):
        average.update(model)
    # 2 - 0.999^693 = 1.5001; the next bfloat16 after 1 is 1.0078, and 1.001 would round to 1.
    assert average.state_dict()["weights"]["weight"].item() == pytest.approx(1.5001, abs=1e-3)
    with average.swapped(model):
        assert model.weight.item() == 1.5


def test_a_tied_weight_is_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    average, first = ab.Average(model, 0.5), model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    average.update(model)
    average.copy_to(model)
    assert torch.equal(model[1].weight, first / 2)


@pytest.mark.parametrize("stop", [0, 4, 7, 10])
def test_an_average_goes_on_in_a_resumed_run_as_if_never_left(tmp_path, stop):
    def leaving(model, step):
        if step.step == stop:
            step.save()
            raise Left("on the way")

    model = network()
    average = ab.Average(model, 0.9, warm_up=True)
    average_weights(average, model)
    expected = weights_of(average, model)
    model = network()
    with pytest.raises(Left, match="on the way"):
        average_weights(ab.Average(model, 0.9, warm_up=True), model, leaving, run=tmp_path)
    model = network()
    resumed = ab.Average(model, 0.9, warm_up=True)
    assert len(average_weights(resumed, model, run=tmp_path)) == 11 - stop
    assert np.array_equal(weights_of(resumed, model), expected)


@pytest.mark.parametrize("key", ["weights", "num_updates"])
def test_a_part_of_the_state_that_is_lost_is_seen(key):  # the control of the one above
    model = network()
    average, fresh = (ab.Average(model, 0.9, warm_up=True) for _ in range(2))
    average_weights(average, model)
    restored = ab.Average(network(), 0.9, warm_up=True)
    restored.load_state_dict(average.state_dict() | {key: fresh.state_dict()[key]})
    for each in (average, restored):
        each.update(network())
    assert distance(weights_of(restored, model), weights_of(average, model)) > 1e-4


def test_a_loaded_state_shares_no_memory_with_where_it_came_from():
    model = nn.BatchNorm1d(2)
    average, other = ab.Average(model, 0.9), ab.Average(model, 0.9)
    other.load_state_dict(average.state_dict())
    for kind, name in itertools.product(("weights", "buffers"), ("weight", "running_mean")):
        tensors = [a.state_dict()[kind].get(name) for a in (average, other)]
        assert tensors == [None, None] or tensors[0].data_ptr() != tensors[1].data_ptr()


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_a_decay_out_of_its_range_is_refused(decay):
    with pytest.raises(RecipeError, match=f"at least 0 and below 1, such as 0.999, got {decay}"):
        ab.Average(nn.Linear(1, 1), decay)


def test_another_model_and_another_decay_are_refused():
    average = ab.Average(nn.Linear(2, 1), 0.9)
    for other in (nn.Linear(3, 1), nn.Linear(2, 1, bias=False), nn.Sequential(nn.Linear(2, 1))):
        for act in (average.update, average.copy_to):
            with pytest.raises(ModelError, match="Pass the model that the average was made from"):
                act(other)
        with pytest.raises(ModelError, match=r"the average has .* of shape"):
            average.load_state_dict(ab.Average(other, 0.9).state_dict())
    with pytest.raises(RunError, match=r"begun with decay and warm_up = \(0.5, False\)"):
        average.load_state_dict(ab.Average(nn.Linear(2, 1), 0.5).state_dict())
