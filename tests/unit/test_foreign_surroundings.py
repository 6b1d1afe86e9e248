"""GradScalers, critics and trainers of others around the library.

Oracle: the same in plain PyTorch. Tolerance: 1e-10, relative, in float64, for sums in another
order; what is in float32 says its own.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError
from foreign import LAYOUTS, X, Y, by_library, distance, entropy, flat, network, plainly


class Scaling:
    """A loop with a GradScaler, by the library or in plain PyTorch."""

    def __init__(self, **how):
        self.model = network().float()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, **how)
        self.batch = X.float(), Y

    def go_back(self, **how):
        ab.batch_gradient(self.model, ab.Objective(entropy), self.batch, **how)

    def go_back_plainly(self):
        self.optimizer.zero_grad()
        self.scaler.scale(entropy(self.model, self.batch).mean()).backward()

    def step(self, max_norm=None):
        if max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("size", [None, 5])
def test_a_grad_scaler_that_is_given_steps_as_around_a_plain_loss(size, max_norm):
    one, other = Scaling(), Scaling()
    for _ in range(5):
        one.go_back(scaler=one.scaler, layout=ab.Layout(size))
        one.step(max_norm)
        other.go_back_plainly()
        other.step(max_norm)
    assert one.scaler.get_scale() == other.scaler.get_scale() == 4096  # it grew twice
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("trained", [[0, 2], [2]])  # the optimiser may not hold the first weight
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_grad_scaler_that_is_not_given_is_refused(max_norm, trained):
    loop = Scaling()
    parameters = [p for i in trained for p in loop.model[i].parameters()]
    loop.optimizer = torch.optim.SGD(parameters, lr=0.1)
    loop.scaler.scale(torch.ones(()))
    loop.go_back()
    with pytest.raises(ModelError, match=r"GradScaler.step\(\) divides gradients by its scale"):
        loop.step(max_norm)


def test_a_disabled_grad_scaler_steps_like_the_optimiser():
    loop = Scaling(enabled=False)
    before = loop.model[0].weight.clone()
    loop.go_back()
    right = before - 0.1 * loop.model[0].weight.grad
    loop.step()
    assert torch.equal(loop.model[0].weight, right)


def critic():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


class Trainer:
    """Not a module; holds a critic in a method, and as a namespace."""

    def __init__(self, model, judge):
        self.model, self.held = model, SimpleNamespace(judge=judge)
        self.idle = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def judge(self, z):
        return -self.held.judge(z)[:, 0]

    def losses(self, model, batch):
        return self.judge(model(batch[0]))

    def other_losses(self, model, batch):
        return entropy(model, batch)


def ways_to(judge, model):
    def closure(model, batch):
        return -judge(model(batch[0]))[:, 0]

    def argument(judge, model, batch):
        return -judge(model(batch[0]))[:, 0]

    def nested(model, batch):
        return closure(model, batch)

    def default(model, batch, judges=(judge,)):
        return -judges[0](model(batch[0]))[:, 0]

    space = SimpleNamespace(judge=judge)

    def namespace(model, batch):
        return -space.judge(model(batch[0]))[:, 0]

    ways = [closure, functools.partial(argument, judge), nested, default, namespace]
    return [*ways, Trainer(model, judge).losses]


@pytest.mark.parametrize("size", [None, 8, 4])
@pytest.mark.parametrize("way", range(6))
def test_batch_normalisation_outside_of_the_model_goes_by_grains(way, size):
    judge, model = critic(), network()
    values = []
    for a in (0, 4, 8):  # by hand: the batch's statistics of each grain
        z = judge[0](model(X[a : a + 4]))
        z = F.batch_norm(z, None, None, judge[1].weight, judge[1].bias, training=True)
        values.append(-judge[2](z)[:, 0])
    torch.cat(values).mean().backward()
    right, uncut = flat(model), plainly(lambda m, b: -judge(m(b[0]))[:, 0], (X, Y))

    judge, model = critic(), network()
    for p in judge.parameters():
        p.grad = torch.full_like(p, 7)
    losses = ways_to(judge, model)[way]
    ab.batch_gradient(model, ab.Objective(losses, grain=4), (X, Y), layout=ab.Layout(size))
    assert distance(flat(model), right) < 1e-10
    assert distance(uncut, right) > 0.01  # the control
    assert all(bool((p.grad == 7).all()) for p in judge.parameters())


def test_a_module_that_the_losses_do_not_use_is_not_blamed():
    model = network()
    trainer = Trainer(model, critic())
    result = ab.batch_gradient(
        model, ab.Objective(trainer.other_losses), (X, Y), layout=ab.Layout(5)
    )
    assert result.micro_batch == 5
    assert distance(flat(model), plainly(entropy, (X, Y))) < 1e-10


@pytest.mark.parametrize("size", LAYOUTS)
def test_the_gradients_of_a_critic_are_left_alone(size):
    judge = nn.Linear(3, 1).double()
    for p in judge.parameters():
        p.grad = torch.full_like(p, 7)
    by_library(lambda m, b: judge(m(b[0]))[:, 0], (X, Y), layout=ab.Layout(size))
    assert judge.weight.grad.tolist() == [[7, 7, 7]]
    assert judge.bias.grad.tolist() == [7]


def test_a_parameter_that_is_not_trainable_loses_its_old_gradient():
    model = network()
    model[0].weight.requires_grad_(False).grad = torch.ones(8, 4, dtype=torch.float64)
    ab.batch_gradient(model, ab.Objective(entropy), (X, Y))
    assert model[0].weight.grad is None
