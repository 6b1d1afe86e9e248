"""Averages and stopping from the command line: which weights are used, and what is said.

Oracle: the average in the checkpoint, applied to scikit-learn's digits in NumPy float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from command_line import STEPS_AN_EPOCH, anybatch, run_command, write_recipe

FLOAT32 = 1e-5  # relative: products of 64 terms in float32 against float64


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def state(name: str) -> dict:
    """A file of the newest checkpoint."""
    newest = sorted(Path("run/checkpoints").glob("step-*"))[-1]
    return torch.load(newest / f"{name}.pt", weights_only=True)


def test_evaluate_predict_and_export_use_the_average_and_say_so() -> None:
    run_command("train", write_recipe(Path(), average={"decay": 0.9}), "--out", "run")
    average, last = state("user")["average"]["weights"], state("model")
    run_command("export", "run", "--out", "weights")
    exported = load_file("weights")
    for name, weight in average.items():
        assert np.array_equal(exported[name], weight.numpy())
        assert not np.array_equal(exported[name], last[name].numpy())  # the control
    predicted = run_command("predict", "run", "--json").report
    ids = [row["example"] for row in predicted["predictions"]]
    logits = load_digits().data[ids] / 16 @ average["1.weight"].T.double().numpy()
    logits += average["1.bias"].numpy()
    result = np.array([row["outputs"] for row in predicted["predictions"]])
    np.testing.assert_allclose(result, logits, rtol=FLOAT32, atol=FLOAT32)
    evaluated = run_command("evaluate", "run", "--json").report
    hits = logits.argmax(1) == load_digits().target[ids]
    assert evaluated["metrics"]["accuracy"] == pytest.approx(hits.mean(), abs=1e-7)
    assert evaluated["weights"] == predicted["weights"] == "average"


def test_without_an_average_the_weights_are_those_of_the_last_update() -> None:
    run_command("train", write_recipe(Path()), "--out", "run")
    for command in ("evaluate", "predict", "export"):
        assert run_command(command, "run", "--json").report["weights"] == "last"


def test_a_run_that_stopped_early_says_why_and_how_to_go_on_and_can_be_used() -> None:
    stop = {"metric": "accuracy", "target": 0.5}
    path = write_recipe(Path(), stop=stop, run={"epochs": 30})
    ended = anybatch("train", path, "--out", "run")
    assert (ended.code, "Stopped and saved" in ended.out) == (0, False)
    assert "stopped early: held-out accuracy" in ended.err
    assert "has reached stop.target = 0.5. To continue, set another" in ended.err
    assert "anybatch predict run" in ended.out
    again = anybatch("resume", "run", "--json")
    product = again.report["step"]
    assert (again.code, again.report["complete"], again.report["stopped_early"]) == (0, False, True)
    assert product < 30 * STEPS_AN_EPOCH
    assert run_command("evaluate", "run", "--json").report["metrics"]["accuracy"] >= 0.5
    on = anybatch("resume", "run", "--set", "stop.target=0.99", "--set", "run.epochs=5", "--json")
    assert (on.report["complete"], on.report["step"]) == (True, 5 * STEPS_AN_EPOCH)
