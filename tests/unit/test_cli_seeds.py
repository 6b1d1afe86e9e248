"""`anybatch train --seeds N`: several initialisations of one recipe, mean and spread.

Oracle: the same recipe trained by itself with each seed, and the statistics by hand.
"""

from pathlib import Path

import numpy as np
import pytest

from command_line import anybatch, run_command, write_recipe


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digest(run: str) -> str:
    return run_command("verify", run, "--json").report["digest"]


@pytest.mark.slow
def test_several_seeds_are_the_runs_of_each_with_mean_and_spread():
    recipe = write_recipe(Path())
    result = run_command("train", recipe, "--out", "all", "--seeds", 3, "--json").report
    assert result["runs"] == ["all/seed-0", "all/seed-1", "all/seed-2"]
    accuracies = []
    for seed in range(3):
        ours = ("--out", f"one-{seed}", "--set", f"run.seed={seed}")
        alone = run_command("train", recipe, *ours, "--json").report
        accuracies.append(alone["held_out"]["accuracy"])
        assert digest(f"all/seed-{seed}") == digest(f"one-{seed}")
    assert len({digest(f"one-{seed}") for seed in range(3)}) == 3
    spread = result["held_out"]["accuracy"]
    # Tolerance: means of three numbers in float64.
    assert spread["mean"] == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert spread["spread"] == pytest.approx(np.std(accuracies, ddof=1), rel=1e-12)
    assert (spread["min"], spread["max"]) == (min(accuracies), max(accuracies))


def test_the_seeds_follow_that_of_the_recipe_and_are_told_apart():
    recipe = write_recipe(Path())
    message = run_command("train", recipe, "--out", "all", "--seeds", 2, "--set", "run.seed=7").out
    assert "seed 7" in message
    assert "seed 8" in message
    assert Path("all/seed-8/run.json").is_file()


def test_no_seeds_at_all_are_refused():
    ended = anybatch("train", write_recipe(Path()), "--seeds", 0)
    assert ended.code == 2
    assert "--seeds" in ended.err
