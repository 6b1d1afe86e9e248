"""Runs of recipes: groups, averages and stopping, against plain loops of torch and NumPy.

Oracles: `by_hand`, a loop of torch's own loss and optimiser over the order's batches, and NumPy
float64 for averages and held-out losses. Runs that were left and resumed are compared by digest,
bit for bit.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from anybatch.recipe.build import Setup, build
from anybatch.recipe.files import change_recipe
from anybatch.recipe.results import verify_run
from anybatch.recipe.runs import create_run, read_run_recipe, reopen_run
from anybatch.recipe.schema import StopSection
from anybatch.recipe.stopping import Stopping
from anybatch.recipe.train import Progress, train
from anybatch.runs.records import read_records
from anybatch.training.evaluation import Evaluation
from command_line import STEPS_AN_EPOCH, recipe

Array = NDArray[np.float64]
ROUNDING = 1e-12  # relative: float64, a sum of up to 256 examples, some 20 updates
EXACT = {"run.dtype": "float64"}
FAST = {"optimizer.lr": 20.0}  # the held-out values go up and down


def start_run(folder: Path, leave: int | None = None, **keys: Any) -> list[Progress]:
    """A run begun, and left after so many updates without a word."""
    setup = build(recipe(**keys), allow_code=False)
    with create_run(setup.recipe, folder) as run:
        return take_updates(train(setup, run), leave)


def resume_run(folder: Path, *changes: str) -> list[Progress]:
    """A run continued to its end."""
    setup = build(change_recipe(read_run_recipe(folder), changes), allow_code=False)
    with reopen_run(setup, folder) as run:
        return list(train(setup, run))


def take_updates(updates: Any, leave: int | None) -> list[Progress]:
    result = []
    for progress in updates:
        result.append(progress)
        if progress.step.step + 1 == leave:
            break
    return result


def digest(folder: Path) -> str:
    """Return the digest of the newest checkpoint."""
    result = verify_run(folder)
    assert result["ok"], result
    return str(result["digest"])


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind."""
    return [row for row in read_records(folder / "records.jsonl") if row["kind"] == kind]


def flat(model: torch.nn.Module) -> Array:
    """All weights, in float64."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().numpy().copy()


def distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Groups


GROUPS = {"optimizer.groups": [{"on": ["*bias"], "lr_factor": 2.0, "weight_decay": 0.0}]}
CAFFE = {"optimizer.args": {"momentum": 0.9, "weight_decay": 0.01}} | GROUPS
STEPS = {"schedule.name": "step", "schedule.every": 1500, "schedule.factor": 0.5}


def by_hand(setup: Setup, factor: float, decay: float, num_steps: int) -> Array:
    """Return the weights after a loop of SGD with momentum, whose biases have a rate and decay of
    their own; the rate halves each 1500 examples."""
    model, inputs, targets = setup.model, *setup.data.columns
    weight, bias = model.parameters()
    velocity = {p: torch.zeros_like(p) for p in (weight, bias)}
    examples = 0
    for step in range(num_steps):
        ids = setup.order.indices(step)
        loss = F.cross_entropy(model(inputs[ids]), targets[ids])
        gradients = torch.autograd.grad(loss, [weight, bias])
        lr = 0.5 * 0.5 ** (examples // 1500)
        for p, g, own_lr, own_decay in zip(
            (weight, bias), gradients, (lr, factor * lr), (0.01, decay), strict=True
        ):
            velocity[p] = 0.9 * velocity[p] + g + own_decay * p.detach()
            p.data -= own_lr * velocity[p]
        examples += len(ids)
    return flat(model)


def train_with_groups(folder: Path, leave: int | None = None) -> Array:
    setup = build(recipe(**EXACT, **CAFFE, **STEPS, **{"run.epochs": 3}), allow_code=False)
    with create_run(setup.recipe, folder) as run:
        assert len(take_updates(train(setup, run), leave)) == 3 * STEPS_AN_EPOCH
    return flat(setup.model)


def test_groups_keep_their_proportion_under_a_schedule_and_have_a_decay_of_their_own(
    tmp_path: Path,
) -> None:
    got = train_with_groups(tmp_path / "run")
    setup = build(recipe(**EXACT), allow_code=False)
    assert distance(got, by_hand(setup, 2.0, 0.0, 3 * STEPS_AN_EPOCH)) < ROUNDING


@pytest.mark.parametrize(("factor", "decay"), [(1.0, 0.0), (2.0, 0.01)])
def test_the_loop_by_hand_tells_a_group_that_is_passed_over(  # the control
    tmp_path: Path, factor: float, decay: float
) -> None:
    got = train_with_groups(tmp_path / "run")
    setup = build(recipe(**EXACT), allow_code=False)
    assert distance(got, by_hand(setup, factor, decay, 3 * STEPS_AN_EPOCH)) > 1e6 * ROUNDING


# Averages


def train_with_averages(folder: Path, **keys: Any) -> tuple[list[Array], list[Evaluation], Setup]:
    """Return the weights before the first and after each update, and each held-out evaluation."""
    keys = EXACT | {"run.epochs": 2} | keys
    setup = build(recipe(**keys), allow_code=False)
    weights, result = [flat(setup.model)], []
    with create_run(setup.recipe, folder) as run:
        for progress in train(setup, run):
            weights.append(flat(setup.model))
            result += [progress.held_out] if progress.held_out else []
    return weights, result, setup


def compute_held_out_loss(setup: Setup, weights: Array) -> float:
    """Mean cross-entropy of a linear classifier in NumPy."""
    inputs, targets = (tensor.numpy() for tensor in setup.select_split("held_out").columns)
    logits = inputs.reshape(len(inputs), -1) @ weights[:640].reshape(10, 64).T + weights[640:]
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(targets)), targets].mean())


def moving(weights: list[Array], decay: float) -> Array:
    """Each set of weights times what is left of it."""
    n = len(weights) - 1
    parts = [(1 - decay) * decay ** (n - k) * w for k, w in enumerate(weights) if k]
    return np.sum([decay**n * weights[0], *parts], axis=0)


def test_held_out_data_are_evaluated_on_the_average_and_training_is_as_without(
    tmp_path: Path,
) -> None:
    weights, result, setup = train_with_averages(tmp_path / "run", **{"average.decay": 0.9})
    for epoch, evaluation in enumerate(result, 1):
        average = moving(weights[: epoch * STEPS_AN_EPOCH + 1], 0.9)
        assert evaluation.loss == pytest.approx(compute_held_out_loss(setup, average), rel=ROUNDING)
        last = compute_held_out_loss(setup, weights[epoch * STEPS_AN_EPOCH])
        assert abs(evaluation.loss - last) > 1e6 * ROUNDING  # the control
    plain, without, _ = train_with_averages(tmp_path / "plain")
    assert all(map(np.array_equal, weights, plain))
    assert without[-1].loss == pytest.approx(compute_held_out_loss(setup, plain[-1]), rel=ROUNDING)
    for run, expected in (("run", "average"), ("plain", "last")):
        assert [row["weights"] for row in rows(tmp_path / run, "evaluation")] == [expected] * 2


@pytest.mark.slow
@pytest.mark.parametrize("leave", [1, 6, 9])
def test_an_average_survives_a_run_that_is_left(tmp_path: Path, leave: int) -> None:
    keys = {"average.decay": 0.9, "run.epochs": 2, "run.checkpoint_every": 4}
    start_run(tmp_path / "whole", **keys)
    start_run(tmp_path / "parts", leave, **keys)
    resume_run(tmp_path / "parts")
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    start_run(tmp_path / "other", **keys | {"average.decay": 0.8})  # the control
    assert digest(tmp_path / "other") != digest(tmp_path / "whole")


# Stopping: the rules


def first_stop(values: list[float], **keys: Any) -> int | None:
    """After how many epochs it stops."""
    stopping = Stopping(StopSection.model_validate({"metric": "m"} | keys))
    for epoch, value in enumerate(values):
        stopping.note(epoch, {"m": value, "loss": value})
        if stopping.reason is not None:
            return epoch + 1
    return None


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ({"target": 0.9}, [0.5, 0.89, 0.9, 1.0], 3),
        ({"target": 0.9, "metric": "loss"}, [1.5, 0.91, 0.9, 0.1], 3),
        ({"target": 0.9, "better": "lower"}, [1.5, 0.91, 0.9, 0.1], 3),
        ({"target": 0.9}, [0.5, 0.8], None),
        ({"patience": 2}, [0.5, 0.6, 0.6, 0.55, 0.9], 4),  # as good is not better
        ({"patience": 2}, [0.5, 0.4, 0.6, 0.5, 0.6], 5),
        ({"patience": 2, "metric": "loss"}, [0.5, 0.6, 0.4, 0.4, 0.5], 5),
        ({"patience": 1}, [0.1, 0.2, 0.3], None),
        ({"patience": 1}, [0.5, math.nan], 2),
        ({"patience": 3}, [math.nan, 0.2, 0.1, 0.3], None),
        ({"patience": 1, "target": 0.7}, [0.5, 0.7, 0.9], 2),
        ({"patience": 1, "target": 0.7}, [0.5, 0.4, 0.9], 2),
    ],
)
def test_it_stops_at_the_epoch_counted_by_hand(
    keys: dict[str, Any], values: list[float], expected: int | None
) -> None:
    assert first_stop(values, **keys) == expected


# Stopping: runs


def curve(folder: Path, **keys: Any) -> list[float]:
    """Return the held-out loss after each of 12 epochs without a stop."""
    start_run(folder, **FAST | {"run.epochs": 12} | keys)
    return [row["loss"] for row in rows(folder, "evaluation")]


def patient(values: list[float], patience: int) -> int:
    """After how many epochs the values have not been below their least for so long."""
    return next(
        n
        for n in range(1, len(values) + 1)
        if n > patience and min(values[n - patience : n]) >= min(values[: n - patience])
    )


STOP = FAST | {"run.epochs": 12, "stop.metric": "loss", "stop.patience": 2}


def test_a_run_stops_by_patience_says_why_and_keeps_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = curve(tmp_path / "free")
    expected = patient(values, 2)
    assert 3 <= expected < 12
    last = start_run(tmp_path / "run", **STOP)[-1]
    best = int(np.argmin(values[:expected]))
    reason = f"has not been better than {values[best]:.6g}, of epoch {best + 1}, for stop.patience"
    assert last.stopped is not None
    assert reason in last.stopped
    assert f"stopped early: {last.stopped}. To continue, set another stop.target" in caplog.text
    assert f"anybatch resume {tmp_path / 'run'} --set KEY=VALUE" in caplog.text
    assert verify_run(tmp_path / "run")["step"] == expected * STEPS_AN_EPOCH == last.step.step + 1
    assert [row["loss"] for row in rows(tmp_path / "run", "evaluation")] == values[:expected]
    rest = rows(tmp_path / "run", "evaluation")[-1]["best"]
    assert rest == {"epoch": best, "value": values[best]}
    stop = rows(tmp_path / "run", "stop")
    assert [(row["step"], row["reason"]) for row in stop] == [(last.step.step, last.stopped)]


def test_stopping_by_the_loss_looks_at_the_data_without_the_penalty(tmp_path: Path) -> None:
    keys = {"objective.penalty": [{"kind": "L2", "strength": 0.02}], "run.epochs": 6}
    start_run(tmp_path / "free", **keys)
    evaluations = rows(tmp_path / "free", "evaluation")
    data_losses = [row["parts"]["data"] for row in evaluations]
    target = data_losses[2]
    expected = 1 + next(n for n, loss in enumerate(data_losses) if loss <= target)
    stop = {"stop.metric": "loss", "stop.target": target}
    last = start_run(tmp_path / "run", **keys | stop)[-1]
    assert last.step.step + 1 == expected * STEPS_AN_EPOCH
    assert evaluations[expected - 1]["loss"] > 1.01 * target  # the control: with the penalty


def test_a_run_stops_when_it_reaches_its_target(tmp_path: Path) -> None:
    target = {"stop.metric": "accuracy", "stop.target": 0.8, "run.epochs": 9}
    start_run(tmp_path / "free", **{"run.epochs": 9})
    values = [row["metrics"]["accuracy"] for row in rows(tmp_path / "free", "evaluation")]
    expected = next(n for n, value in enumerate(values, 1) if value >= 0.8)
    assert 1 < expected < 9
    result = start_run(tmp_path / "run", **target)
    assert len(result) == expected * STEPS_AN_EPOCH
    assert [progress.stopped is None for progress in result] == [True] * (len(result) - 1) + [False]


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 4, 100])
def test_a_run_left_anywhere_stops_at_the_same_epoch_with_the_same_bits(
    tmp_path: Path, every: int | None
) -> None:
    keys = STOP | {"run.checkpoint_every": every}
    num_updates = len(start_run(tmp_path / "whole", **keys))
    for leave in (1, 6, 7, num_updates - 1, num_updates):
        folder = tmp_path / str(leave)
        start_run(folder, leave, **keys)
        resume_run(folder)
        assert digest(folder) == digest(tmp_path / "whole")
        assert rows(folder, "stop") == rows(tmp_path / "whole", "stop")


def test_a_resume_that_forgets_the_values_so_far_stops_elsewhere(  # the control
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_updates = len(start_run(tmp_path / "whole", **STOP))
    start_run(tmp_path / "run", num_updates - 1, **STOP)
    monkeypatch.setattr(Stopping, "load_state_dict", lambda self, state: None)
    resume_run(tmp_path / "run")
    assert digest(tmp_path / "run") != digest(tmp_path / "whole")


@pytest.mark.slow
def test_a_stopped_run_stays_so_until_its_rules_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    num_updates = len(start_run(tmp_path / "run", **STOP))
    before = digest(tmp_path / "run")
    caplog.clear()
    for changes in ([], ["run.epochs=20"]):
        assert resume_run(tmp_path / "run", *changes) == []
        assert "stopped early: held-out loss has not been better" in caplog.text
        assert digest(tmp_path / "run") == before
    start_run(tmp_path / "patient", **STOP | {"stop.patience": 12})
    more = resume_run(tmp_path / "run", "stop.patience=12", "run.epochs=12")
    assert more[0].step.step == num_updates
    assert digest(tmp_path / "run") == digest(tmp_path / "patient")


def test_a_rule_that_comes_true_at_the_last_update_is_an_ordinary_end(tmp_path: Path) -> None:
    values = curve(tmp_path / "free")
    last = start_run(tmp_path / "run", **STOP | {"run.epochs": patient(values, 2)})[-1]
    assert last.stopped is None
    assert rows(tmp_path / "run", "stop") == []
    assert resume_run(tmp_path / "run", "run.epochs=12") == []  # as a run of 12 epochs would have


def fail_at_once(folder: Path, *, is_tracked: bool) -> None:
    with create_run(recipe(), folder):
        if is_tracked:
            (folder / "tensorboard").mkdir()
        raise OSError("the disk is full")


def test_a_run_that_fails_before_its_first_update_stays_a_run_if_a_tracker_has_written(
    tmp_path: Path,
) -> None:
    for name, is_tracked in (("empty", False), ("tracked", True)):  # the first is the control
        with pytest.raises(OSError, match="the disk is full"):
            fail_at_once(tmp_path / name, is_tracked=is_tracked)
        assert (tmp_path / name).exists() == is_tracked
    assert len(resume_run(tmp_path / "tracked")) == STEPS_AN_EPOCH


@pytest.mark.parametrize("before", [(), ("sgd", "adam")], ids=["began without", "began fused"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_resumed_run_keeps_whether_its_optimizer_is_fused(
    name: str, before: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"optimizer.name": name, "optimizer.lr": 0.1, "run.epochs": 2}

    def fuse(*names: str) -> None:
        monkeypatch.setattr("anybatch.recipe.optimizers._FUSED", names)

    other = () if before else (name,)
    fuse(*before)
    start_run(tmp_path / "whole", **keys)
    start_run(tmp_path / "left", STEPS_AN_EPOCH + 1, **keys)
    fuse(*other)
    start_run(tmp_path / "other", **keys)
    resume_run(tmp_path / "left")
    assert digest(tmp_path / "left") == digest(tmp_path / "whole")
    assert digest(tmp_path / "other") != digest(tmp_path / "whole")  # the control
