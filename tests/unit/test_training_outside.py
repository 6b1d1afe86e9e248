"""Modules besides the model that a run trains must be in its checkpoints.

Oracle: the training of critic and model in one go, without a resume.
"""

from functools import partial

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import RunError


def data():
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def networks():
    torch.manual_seed(0)
    return nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1))


def fool(critic, model, batch):
    return critic(model(batch))[:, 0]


def in_a_closure(critic):
    return lambda model, batch: critic(model(batch))[:, 0]


def in_a_partial(critic):
    return partial(fool, critic)


class Player:
    def __init__(self, critic):
        self.critic = critic

    def losses(self, model, batch):
        return self.critic(model(batch))[:, 0]


def in_an_object(critic):
    return Player(critic).losses


HOLDERS = [in_a_closure, in_a_partial, in_an_object]


def train(holder, folder, epochs, state=None, is_trained=True):
    """Return the weights of model and critic after some epochs."""
    model, critic = networks()
    steps = ab.steps(
        model,
        ab.Objective(holder(critic)),
        torch.optim.SGD(model.parameters(), lr=0.1),
        data(),
        order=ab.Order(12, batch_size=4, seed=0),
        epochs=epochs,
        run=folder,
        state={} if state is None else state(critic),
    )
    with torch.no_grad():
        for step in steps:
            if is_trained:  # by something that depends on the step alone
                critic[0].weight.add_(0.01 * (step.step + 1))
    all_parameters = (*model.parameters(), *critic.parameters())
    return torch.cat([p.detach().flatten() for p in all_parameters])


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_critic_that_is_trained_and_not_kept_is_refused_by_name(holder, tmp_path):
    with pytest.raises(
        RunError, match=r"(critic|argument 0).*example_losses uses, has changed.*state="
    ):
        train(holder, tmp_path / "run", 1)


@pytest.mark.parametrize("holder", HOLDERS)
def test_kept_in_the_state_it_is_resumed(holder, tmp_path):
    def keep(critic):
        return {"critic": critic}

    whole = train(holder, tmp_path / "whole", 2, keep)
    half = train(holder, tmp_path / "resumed", 1, keep)
    assert not torch.equal(half, whole)  # the control
    assert torch.equal(train(holder, tmp_path / "resumed", 2, keep), whole)


@pytest.mark.parametrize("holder", HOLDERS)
def test_one_that_stays_as_it_is_may_be_left_out(holder, tmp_path):
    assert train(holder, tmp_path / "run", 1, is_trained=False).isfinite().all()
