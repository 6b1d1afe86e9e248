"""`Run` in a loop of one's own: a GAN with two optimisers, a loop with draws, policy gradients.

Oracle: the same loop without a stop, compared bit for bit.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import CheckpointError, RunError
from anybatch.runs.ledger_files import read_ledger
from anybatch.runs.run import read_records
from command_line import run_command

REAL = torch.linspace(-1, 1, 64).reshape(32, 2)


def make_gan():
    torch.manual_seed(0)
    generator, critic = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    return {
        "generator": generator,
        "critic": critic,
        "generator_optimizer": torch.optim.Adam(generator.parameters(), lr=0.05),
        "critic_optimizer": torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9),
        "noise": torch.Generator().manual_seed(3),
    }


def critic_losses(critic, batch):
    real, fake = batch
    return (critic(real)[:, 0] - 1) ** 2 + critic(fake)[:, 0] ** 2


def train_gan(folder, stop, every=2, state=None, observe=None):
    state = state or make_gan()
    run = ab.Run(folder)
    for t in range(run.resume(state=state), stop):
        ids = torch.randperm(32)[:8]  # of the global generator, on purpose
        noise = torch.randn(8, 3, generator=state["noise"])
        noise *= 1 + random.random() + np.random.rand()  # noqa: NPY002
        fake = state["generator"](noise).detach()
        gradient = ab.batch_gradient(
            state["critic"], ab.Objective(critic_losses), (REAL[ids], fake), observe=observe
        )
        state["critic_optimizer"].step()
        critic = state["critic"].requires_grad_(False)

        def generator_losses(generator, noise, critic=critic):
            return (critic(generator(noise))[:, 0] - 1) ** 2

        second = ab.batch_gradient(state["generator"], ab.Objective(generator_losses), noise)
        critic.requires_grad_(True)
        state["generator_optimizer"].step()
        run.record(gradient, step=t, metrics={"generator": second.loss.item()})
        if (t + 1) % every == 0:
            run.checkpoint(state=state)
    run.close()
    return torch.cat(
        [p.detach().flatten() for name in ("generator", "critic") for p in state[name].parameters()]
    )


def seed_all():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


@pytest.mark.parametrize("left_after", [1, 3, 4])
def test_a_loop_that_was_left_ends_with_the_same_bits(tmp_path, left_after):
    state = make_gan()
    seed_all()
    whole = train_gan(tmp_path / "whole", 6, state=state)
    state = make_gan()
    seed_all()
    train_gan(tmp_path / "cut", left_after, state=state)
    torch.manual_seed(99)  # a resume does not depend on what was drawn since
    assert torch.equal(train_gan(tmp_path / "cut", 6), whole) == (left_after > 1)
    rows = [
        row for row in read_records(tmp_path / "cut" / "records.jsonl") if row["kind"] == "step"
    ]
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["examples"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert "generator" in rows[0]["metrics"]


def test_the_ledger_has_each_update_once(tmp_path):
    seed_all()
    observe = ab.Observe(norms=True)
    train_gan(tmp_path / "run", 3, observe=observe)
    train_gan(tmp_path / "run", 6, observe=observe)
    columns = read_ledger(tmp_path / "run")
    assert sorted(set(columns["step"].tolist())) == list(range(6))
    assert len(columns["norm"]) == 48


def test_the_commands_read_it(tmp_path):
    seed_all()
    train_gan(tmp_path / "run", 4, observe=ab.Observe(norms=True))
    run_command("verify", tmp_path / "run")
    assert "4" in run_command("show", tmp_path / "run").out
    ranked = run_command("examples", tmp_path / "run", "--json").report
    assert len(ranked["examples"]) > 0


def test_modes_and_frozen_parameters_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    state = {"model": model, "log": []}
    run = ab.Run(tmp_path / "run")
    run.resume(state=state)
    gradient = ab.batch_gradient(
        model, ab.Objective(lambda m, x: m(x).sum(1)), REAL, key=ab.Key(0, 0)
    )
    model[0].bias.requires_grad_(False)
    model[1].eval()
    state["log"].append(0.5)
    run.record(gradient, step=0)
    run.checkpoint(state=state)
    run.close()

    again = {"model": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "log": []}
    run = ab.Run(tmp_path / "run")
    assert run.resume(state=again) == 1
    assert not again["model"][0].bias.requires_grad
    assert again["model"][0].weight.requires_grad
    assert not again["model"][1].training
    assert again["model"].training
    assert again["log"] == [0.5]
    run.close()


def test_other_data_are_refused(tmp_path):
    state = make_gan()
    run = ab.Run(tmp_path / "run")
    run.resume(state=state, data=REAL)
    gradient = ab.batch_gradient(state["critic"], ab.Objective(critic_losses), (REAL, REAL))
    run.record(gradient, step=0)
    run.checkpoint(state=state)
    run.close()
    run = ab.Run(tmp_path / "run")
    with pytest.raises(RunError, match="other data"):
        run.resume(state=make_gan(), data=REAL + 1)
    run.close()


def make_gradient(state):
    return ab.batch_gradient(state["critic"], ab.Objective(critic_losses), (REAL, REAL))


@pytest.fixture
def first_run(tmp_path):
    run, state = ab.Run(tmp_path / "run"), make_gan()
    run.resume(state=state)
    yield run, state
    run.close()


def test_a_step_that_is_recorded_already_is_refused(first_run):
    run, state = first_run
    run.record(make_gradient(state), step=3)
    with pytest.raises(RunError, match="step is 3, and updates up to 3 are recorded"):
        run.record(make_gradient(state), step=3)
    with pytest.raises(RunError, match=r"step is None\. It must be the number"):
        run.record(make_gradient(state))


def test_record_before_resume_is_refused(tmp_path):
    run = ab.Run(tmp_path / "run")
    with pytest.raises(RunError, match=r"comes after run\.resume"):
        run.record(make_gradient(make_gan()), step=0)
    run.close()


def test_other_objects_at_a_checkpoint_are_refused(first_run):
    run, state = first_run
    with pytest.raises(RunError, match=r"got \['critic'\], and run.resume\(state=...\) got the"):
        run.checkpoint(state={"critic": state["critic"]})


def test_weights_that_are_not_finite_are_not_saved(first_run):
    run, state = first_run
    run.record(make_gradient(state), step=0)
    with torch.no_grad():
        state["critic"][0].weight[1, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"critic\.0\.weight"):
        run.checkpoint(state=state)


@pytest.mark.parametrize("state", [{}, None, {"lr": 0.1}], ids=["empty", "none", "a number"])
def test_a_state_that_cannot_be_restored_is_refused(tmp_path, state):
    run = ab.Run(tmp_path / "run")
    with pytest.raises(RunError, match="state"):
        run.resume(state=state)
    run.close()


def test_a_run_of_steps_is_not_gone_on_with_by_hand(tmp_path):
    model = nn.Linear(2, 1)
    loop = ab.steps(
        model,
        ab.Objective(lambda m, batch: (m(batch[0])[:, 0]) ** 2),
        torch.optim.SGD(model.parameters(), lr=0.1),
        (REAL, REAL),
        order=ab.Order(32, batch_size=8),
        epochs=1,
        run=tmp_path / "run",
    )
    list(loop)
    run = ab.Run(tmp_path / "run")
    with pytest.raises(RunError, match="begun with loop = None, and cannot go on with 'own'"):
        run.resume(state={"model": model})
    run.close()
