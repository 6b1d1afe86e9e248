"""Recipes with a reference size: building carries them, and everything else sees them as written.

The oracle of a run is one of the recipe whose numbers were carried by hand: the same weights, bit
for bit.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anybatch.errors import RecipeError, RunError
from anybatch.recipe.build import build
from anybatch.recipe.files import change_recipe, find_recipe, fingerprint_recipe, read_recipe
from anybatch.recipe.results import restore_run, verify_run
from anybatch.recipe.runs import create_run, find_newest, read_run_recipe, reopen_run
from anybatch.recipe.schema import Recipe
from anybatch.recipe.train import train
from anybatch.runs.records import read_records
from command_line import recipe, refuse, run_command, write_recipe

REFERENCE, SIZE, K = 64, 256, 4

ADAMW: dict[str, Any] = {
    "optimizer.name": "adamw",
    "optimizer.lr": 0.01,
    "optimizer.args": {"betas": [0.98, 0.999], "eps": 1e-4, "weight_decay": 0.25},
    "optimizer.clip_norm": 1.0,
    "average.decay": 0.9375,
    "schedule.warm_up": 500,
    "schedule.warm_up_start": 0.001,
    "run.epochs": 2,
}
BY_HAND: dict[str, Any] = {  # the numbers of ADAMW at 4 times the size
    "optimizer.lr": 0.02,
    "optimizer.args": {"betas": [0.98**4, 0.999**4], "eps": 5e-5, "weight_decay": 0.5},
    "optimizer.clip_norm": 0.5,
    "average.decay": 0.9375**4,
    "schedule.warm_up_start": 0.002,
}
TRAVELS = {"batch.size": SIZE, "batch.reference_size": REFERENCE}


def start_run(folder: Path, result: Recipe, leave: int | None = None) -> list[float]:
    """Return the losses of a new run, left after some updates."""
    setup = build(result, allow_code=False)
    with create_run(result, folder) as run:
        return losses(train(setup, run), leave)


def resume_run(folder: Path) -> list[float]:
    setup = build(read_run_recipe(folder), allow_code=False, fresh=False)
    with reopen_run(setup, folder) as run:
        return losses(train(setup, run), None)


def losses(updates: Iterator[Any], leave: int | None) -> list[float]:
    result = []
    for progress in islice(updates, leave):
        result.append(progress.step.loss)
        if leave is not None and len(result) == leave:
            progress.step.save()
    return result


def digest(folder: Path) -> str:
    result = verify_run(folder)
    assert result["ok"]
    return str(result["digest"])


def test_a_run_is_that_of_the_numbers_carried_by_hand(tmp_path: Path) -> None:
    travelling, by_hand = recipe(**ADAMW | TRAVELS), recipe(**ADAMW | BY_HAND)
    assert start_run(tmp_path / "a", travelling) == start_run(tmp_path / "b", by_hand)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    left = recipe(**ADAMW)  # the control
    assert start_run(tmp_path / "c", left) != start_run(tmp_path / "d", by_hand)


def test_at_its_reference_size_it_is_the_recipe_without_one(tmp_path: Path) -> None:
    stated = recipe(**ADAMW, **{"batch.reference_size": SIZE})
    start_run(tmp_path / "a", stated)
    start_run(tmp_path / "b", recipe(**ADAMW))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("leave", [1, 6, 9])
def test_a_run_left_anywhere_ends_with_the_same_bits(tmp_path: Path, leave: int) -> None:
    stated = recipe(**ADAMW | TRAVELS)
    whole = start_run(tmp_path / "whole", stated)
    begin = start_run(tmp_path / "left", stated, leave)
    assert begin + resume_run(tmp_path / "left") == whole
    assert digest(tmp_path / "left") == digest(tmp_path / "whole")


def test_a_run_keeps_the_recipe_as_written_and_records_the_numbers_built(tmp_path: Path) -> None:
    stated = recipe(**ADAMW | TRAVELS)
    start_run(tmp_path / "run", stated)
    assert read_run_recipe(tmp_path / "run") == stated
    assert (
        find_newest(tmp_path / "run", stated).checkpoint is not None
    )  # its fingerprint is that as written
    with pytest.raises(RunError, match="is not the recipe"):
        find_newest(tmp_path / "run", recipe(**ADAMW | BY_HAND))
    (row,) = [row for row in read_records(tmp_path / "run" / "records.jsonl") if "carried" in row]
    assert row["rule"] == "sqrt"
    assert row["carried"]["optimizer.lr"] == [0.01, 0.02]
    assert set(row["carried"]) == {
        "optimizer.lr",
        "optimizer.args.betas",
        "optimizer.args.eps",
        "optimizer.args.weight_decay",
        "optimizer.clip_norm",
        "average.decay",
        "schedule.warm_up_start",
    }


def test_a_restored_model_is_judged_by_the_average_of_the_decay_as_built(tmp_path: Path) -> None:
    start_run(tmp_path / "run", recipe(**ADAMW | TRAVELS))
    setup, _ = restore_run(tmp_path / "run", allow_code=False)
    assert setup.average is not None
    assert setup.average.decay == 0.9375**4
    assert setup.recipe.average.decay == 0.9375


def test_size_reference_and_rule_change_the_arithmetic_and_stay_on_resume() -> None:
    stated = recipe(**TRAVELS)
    for change in ("batch.size=128", "batch.reference_size=32", "batch.scaling=sqrt"):
        with pytest.raises(RecipeError, match="changes the arithmetic"):
            change_recipe(stated, [change])
    assert fingerprint_recipe(stated) != fingerprint_recipe(recipe())


def test_recipes_without_a_reference_size_have_the_fingerprints_of_before() -> None:
    # taken before there was one
    before = {
        "lenet-digits": "f7760b1190fb839b8b0ad6382e68e857f9d25b9162b09577199e4c3d442309b0",
        "gpt-pydoc": "9feae136ac68d2fe92f15f89964a2f968384935174ce1dc4dc239719e74c2610",
    }
    assert {name: fingerprint_recipe(read_recipe(find_recipe(name))) for name in before} == before


def norms(result: Recipe) -> list[nn.BatchNorm2d]:
    setup = build(result, allow_code=False)
    return [layer for layer in setup.model.modules() if isinstance(layer, nn.BatchNorm2d)]


def normalise(**keys: Any) -> Recipe:
    model = {"model.name": "resnet_small", "model.args": {"channels": 1, "width": 8}}
    return recipe(**model, **keys)


def test_running_statistics_inside_the_model_are_carried_with_it() -> None:
    layers = norms(normalise(**TRAVELS))
    assert len(layers) > 3
    for layer in layers:
        assert layer.momentum == pytest.approx(1 - 0.9**4, rel=1e-14)
    assert {layer.momentum for layer in norms(normalise(**{"batch.size": SIZE}))} == {0.1}


def test_the_grain_of_the_built_objective_is_the_reference_size() -> None:
    assert build(normalise(**TRAVELS), allow_code=False).objective.grain == REFERENCE
    assert build(normalise(**{"batch.size": SIZE}), allow_code=False).objective.grain is None
    assert build(recipe(**TRAVELS), allow_code=False).objective.grain is None  # no norms in it


@pytest.mark.slow
@pytest.mark.parametrize("leave", [1, 7])
def test_a_model_with_running_statistics_resumes_with_the_same_bits(
    tmp_path: Path, leave: int
) -> None:
    stated = normalise(**TRAVELS, **{"run.epochs": 2, "optimizer.lr": 0.05})
    start_run(tmp_path / "whole", stated)
    start_run(tmp_path / "left", stated, leave)
    resume_run(tmp_path / "left")
    assert digest(tmp_path / "left") == digest(tmp_path / "whole")


def test_what_cannot_be_carried_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, batch={"reference_size": 64}, optimizer={"name": "nadam"})
    message = refuse("train", path, "--out", "run")
    assert "'nadam' has no rule that is known" in message
    assert not Path("run").exists()


def test_training_at_any_size_from_the_command_line_shows_what_it_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, batch={"reference_size": 256, "last": "drop"})
    from command_line import anybatch

    ended = anybatch("train", path, "--out", "run", "--set", "batch.size=128", "--json")
    assert ended.code == 0
    words = "rescaled from batch.reference_size = 256 to batch.size = 128 by linear: optimizer.lr"
    assert f"{words} 0.5 -> 0.25" in ended.err
    rows = [row for row in read_records(Path("run/records.jsonl")) if row["kind"] == "step"]
    assert {row["lr"] for row in rows} == {0.25}
    again = anybatch("resume", "run", "--set", "run.epochs=2")
    assert again.code == 0
    assert words in again.err
    assert run_command("evaluate", "run", "--json").report["step"] == 22


def test_the_optimiser_that_is_built_has_the_numbers_carried() -> None:
    setup = build(recipe(**ADAMW | TRAVELS), allow_code=False)
    (group,) = setup.optimizer.param_groups
    assert group["eps"] == pytest.approx(5e-5)
    assert group["lr"] == 0.02
    assert setup.recipe.optimizer.lr == 0.01
    assert isinstance(setup.optimizer, torch.optim.AdamW)
