"""`anybatch advise`: what is measured, what is told, and what is refused.

Oracle of the noise scale: each example's gradient by autograd, one at a time, in float64.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anybatch.advice import speed
from anybatch.advice.measure import (
    Point,
    draw_batches,
    estimate_noise,
    measure_checkpoints,
    measure_training,
)
from anybatch.recipe.build import Setup, build
from anybatch.recipe.files import read_recipe
from anybatch.runs.digest import digest
from anybatch.training.loop import steps
from command_line import (
    NUM_TRAIN,
    anybatch,
    recipe,
    refuse,
    run_command,
    write_module,
    write_recipe,
)

WIDE = {"run.dtype": "float64", "run.threads": 1}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_setup(**keys) -> Setup:
    return build(recipe(**(WIDE | keys)), allow_code=False)


def by_hand(setup: Setup, size: int, count: int, step: int) -> tuple[float, float]:
    """tr(S) and |G|^2, averaged over batches: from |g_i|^2 and |g|^2, each by autograd alone."""
    trace = square = 0.0
    for batch in draw_batches(setup, size, count, step):
        inputs, targets = batch.examples[:2]
        rows = []
        for one, target in zip(inputs, targets, strict=True):
            loss = torch.nn.functional.cross_entropy(setup.model(one[None]), target[None])
            result = torch.autograd.grad(loss, list(setup.model.parameters()))
            rows.append(torch.cat([g.flatten() for g in result]))
        g = torch.stack(rows)
        of_batch = (g.square().sum() - size * g.mean(0).square().sum()) / (size - 1)
        trace += float(of_batch) / count
        square += float(g.mean(0).square().sum() - of_batch / size) / count
    return trace, square


@pytest.mark.parametrize("reduction", ["mean", "sum", {"name": "mean", "scale": 0.01}])
def test_the_noise_is_that_of_each_examples_gradient(reduction):
    """Tolerance: sums of some hundred float64. Control: |G|^2 with the noise still in it."""
    ours = make_setup(**{"batch.size": 64, "objective.reduction": reduction})
    result = estimate_noise(ours, 256, step=3)
    trace, square = by_hand(ours, 64, 4, step=3)
    assert result.examples == 256
    assert result.variance == pytest.approx(trace, rel=1e-9)
    assert result.gradient_square == pytest.approx(square, rel=1e-9)
    assert result.gradient_square != pytest.approx(square + trace / 64, rel=0.01)


def test_the_penalty_is_no_part_of_the_noise():
    penalty = [{"kind": "L2", "strength": 10.0}]
    plain, contents = (
        estimate_noise(make_setup(**{"objective.penalty": p}), 256, 0) for p in ([], penalty)
    )
    assert contents == plain


def test_looking_leaves_the_training_as_it_was():
    ours, alone = make_setup(), make_setup()
    points = list(measure_training(ours, 6, 512))
    assert [point.step for point in points] == [1, 2, 4, 5, 6]
    for _ in steps(
        alone.model,
        alone.objective,
        alone.optimizer,
        alone.training_data.columns,
        order=alone.order,
        epochs=1,
        schedule=alone.schedule,
    ):
        pass
    assert digest(ours.model.state_dict()) == digest(alone.model.state_dict())
    assert digest(ours.model.state_dict()) != digest(make_setup().model.state_dict())  # control
    assert len({point.noise for point in points}) == 5


def test_a_run_is_looked_at_at_each_of_its_checkpoints():
    path = write_recipe(Path(), run={"epochs": 4, "keep": 3})
    run_command("train", path, "--out", "run")
    ours = build(read_recipe(Path("run/recipe.toml")), allow_code=False)
    points = list(measure_checkpoints(ours, Path("run"), 1024))
    assert [point.step for point in points] == [12, 18, 24]
    assert Point.of(24, estimate_noise(ours, 1024, 24)) == points[-1]  # the weights are the newest
    for file in Path("run/checkpoints/step-000000000018").iterdir():
        file.write_bytes(b"damaged")
    assert [point.step for point in measure_checkpoints(ours, Path("run"), 64)] == [12, 24]


def test_a_run_without_a_checkpoint_is_refused():
    run_command("train", write_recipe(Path()), "--out", "run")
    for checkpoint in list(Path("run/checkpoints").iterdir()):
        checkpoint.rename(Path(checkpoint.name))
    assert "no checkpoint there" in refuse("advise", "run")


@pytest.mark.slow
def test_speed_and_memory_are_measured_for_powers_of_two(monkeypatch):
    monkeypatch.setattr(speed, "MAX_MICRO_BATCH", 70)
    result = list(speed.measure_speeds(make_setup()))
    assert [one.micro_batch for one in result] == [1, 2, 4, 8, 16, 32, 64]
    assert all(one.seconds > 0 for one in result)
    peaks = [one.peak_bytes for one in result]
    assert peaks == sorted(peaks)
    # The inputs of 64 examples are float64 of 8x8, and gathered for the pass.
    assert peaks[-1] - peaks[0] > 60 * 64 * 8


@pytest.mark.slow
def test_micro_batches_end_where_memory_does(monkeypatch):
    """The next one may hold twice as much, and half of what is available may be used."""
    ours = make_setup()
    monkeypatch.setattr(speed, "MAX_MICRO_BATCH", 256)
    whole = [one.peak_bytes for one in speed.measure_speeds(ours)]
    assert len(whole) == 9
    monkeypatch.setattr(speed, "count_free_bytes", lambda: 4 * whole[5])
    result = list(speed.measure_speeds(ours))
    assert result[-1].peak_bytes > whole[5] >= result[-2].peak_bytes
    assert len(result) < 9

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(speed, "_measure_speed", full)
    assert list(speed.measure_speeds(ours)) == []


@pytest.mark.slow
def test_a_recipe_gets_a_range_with_reasons(monkeypatch):
    monkeypatch.setattr(speed, "MAX_MICRO_BATCH", 64)
    path = write_recipe(Path(), run={"epochs": 2})
    call = ("advise", path, "--examples", 512, "--price-per-hour", 2)
    messages = run_command(*call, "--html", "page.html").out
    for words in ("noise scale", "64 at a time", "(all)", "A steps", "as fast as any", "cost"):
        assert words in messages
    assert "0.05 to 8 times the critical batch size" in messages.replace("\n", " ")
    page = Path("page.html").read_text()
    assert page.count("Plotly.newPlot") >= 2
    result = run_command(*call, "--json").report
    assert result["advised"]["at_least"] <= result["advised"]["from"] <= result["advised"]["to"]
    assert result["advised"]["to"] <= result["advised"]["at_most"]
    assert (result["steps"], result["batch"], result["num_examples"]) == (12, 256, NUM_TRAIN)
    assert [row["batch"] for row in result["rows"]] == [*(2**k for k in range(11)), NUM_TRAIN]
    assert [point["step"] for point in result["noise_scale"]] == [2, 5, 7, 10, 12]
    assert result["rows"][8]["steps"]["value"] == pytest.approx(12, rel=1e-12)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_is_advised_on_from_the_updates_that_it_has_made(monkeypatch):
    monkeypatch.setattr(speed, "MAX_MICRO_BATCH", 64)
    run_command("train", write_recipe(Path()), "--out", "run")
    run_command("resume", "run", "--set", "run.epochs=3")
    result = run_command("advise", "run", "--json").report
    assert result["steps"] == 18
    assert [point["step"] for point in result["noise_scale"]] == [12, 18]
    message = refuse("advise", "run", "--set", "batch.size=8")
    assert "batch.size is 256 in this run and cannot become 8" in message


NORMS = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
"""


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"optimizer": {"clip_norm": 1.0}}, "With optimizer.clip_norm = 1 a batch's gradient"),
        ({"optimizer": {"clip_examples": 2.5}}, "With optimizer.clip_examples = 2.5"),
        ({"objective": {"reduction": "max"}}, "Expected 'mean' or 'sum' of one term"),
        ({"model": {"name": "norms:net"}}, "BatchNorm1d '2' couples examples"),
        (
            {"order": {"name": "growing", "args": {"sizes": [[500, 512]]}}},
            "order.name = 'growing' has no one batch size",
        ),
    ],
    ids=["clip_norm", "clip_examples", "max", "batch norm", "growing"],
)
def test_where_the_noise_scale_is_not_defined_there_is_no_advice(sections, reason):
    write_module(Path.cwd(), "norms", NORMS)
    message = refuse("advise", write_recipe(Path(), **sections))
    assert reason in message
    assert "growing" in message or "noise scale is that of a mean of independent" in message


def test_mistakes_are_refused_before_anything_is_measured():
    path = write_recipe(Path())
    for price in ("0", "nan", "inf"):
        assert "Expected a number above 0" in refuse("advise", path, "--price-per-hour", price)
    Path("page.html").touch()
    assert "exists and is not written over" in refuse("advise", path, "--html", "page.html")
    assert "there is no recipe 'nowhere'" in refuse("advise", "nowhere")
    ended = anybatch("advise", path, "--examples", 1)
    assert ended.code == 2
    assert "--examples" in ended.err


def test_a_recipe_that_measures_its_rate_is_looked_at_along_its_own_path():
    keys = {"batch.reference_size": 32, "batch.size": 128, "batch.scaling": "adascale"}
    ours, alone = make_setup(**keys), make_setup(**keys)
    assert len(list(measure_training(ours, 6, 256))) == 5
    for step in steps(
        alone.model,
        alone.objective,
        alone.optimizer,
        alone.training_data.columns,
        order=alone.order,
        epochs=1,
        observe=alone.observe,
        schedule=alone.schedule,
    ):
        alone.update_averages(step)
        if step.step + 1 == 6:
            break
    assert digest(ours.model.state_dict()) == digest(alone.model.state_dict())


def test_examples_are_drawn_by_the_weights_of_the_recipe(tmp_path):
    weights = torch.arange(60) % 2 * 3.0  # every other example is never drawn
    inputs, targets = torch.rand(60, 4).numpy(), (torch.arange(60) % 3).numpy()
    np.savez(tmp_path / "w.npz", inputs=inputs, targets=targets, weights=weights.numpy())
    keys = {"data.name": "npz", "data.args": {"path": "w.npz", "weights": "weights"}}
    keys |= {"model.args": {"inputs": [4], "classes": 3}, "batch.size": 8}
    ours = make_setup(**keys, **{"order.name": "weighted"})
    ids = torch.cat([batch.ids for batch in draw_batches(ours, 8, 20, step=0)])
    assert set(ids.tolist()) <= set(range(1, 60, 2))
    plain = torch.cat([batch.ids for batch in draw_batches(make_setup(**keys), 8, 20, step=0)])
    assert not set(plain.tolist()) <= set(range(1, 60, 2))  # the control


def test_buffers_are_as_before_the_look():
    class Counting(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    ours = make_setup()
    ours = replace(ours, model=Counting(ours.model))
    estimate_noise(ours, 256, 0)
    assert float(ours.model.calls) == 0
