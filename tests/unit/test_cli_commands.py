"""train, resume, evaluate, predict, export and verify, on a linear classifier of digits.

Oracle: the exported weights, read by safetensors' own NumPy reader, applied to scikit-learn's
digits in NumPy float64. It shares no code with the engine.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from command_line import (
    NUM_HELD_OUT,
    NUM_TRAIN,
    STEPS_AN_EPOCH,
    anybatch,
    refuse,
    run_command,
    write_recipe,
)

FLOAT32 = 1e-5  # relative: products of 64 terms in float32 against float64


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train_run(out: str = "run", *more: object) -> str:
    """A run of one epoch."""
    run_command("train", write_recipe(Path()), "--out", out, *more)
    return out


def digest(run: str) -> str:
    """Return the digest that `verify` gives."""
    result = run_command("verify", run, "--json").report
    assert result["ok"] is True
    return str(result["digest"])


def by_hand(run: str, ids: list[int]) -> tuple[NDArray[np.float64], float, float]:
    """Logits, mean cross-entropy and accuracy of some digits, by the exported weights."""
    run_command("export", run, "--out", f"{run}.safetensors")
    weights = load_file(f"{run}.safetensors")
    images, classes = load_digits(return_X_y=True)
    logits = images[ids] / 16 @ weights["1.weight"].T.astype(float) + weights["1.bias"]
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    right = classes[ids]
    return logits, -log_p[range(len(ids)), right].mean(), (logits.argmax(1) == right).mean()


def test_train_evaluate_predict_and_export_agree_with_the_weights_applied_by_hand() -> None:
    train_run()
    predicted = run_command("predict", "run", "--json").report
    ids = [row["example"] for row in predicted["predictions"]]
    logits, loss, accuracy = by_hand("run", ids)
    assert len(set(ids)) == NUM_HELD_OUT
    result = np.array([row["outputs"] for row in predicted["predictions"]])
    np.testing.assert_allclose(result, logits, rtol=FLOAT32, atol=FLOAT32)
    assert [row["class"] for row in predicted["predictions"]] == logits.argmax(1).tolist()
    evaluated = run_command("evaluate", "run", "--json").report
    assert evaluated["loss"] == pytest.approx(loss, rel=FLOAT32)
    assert evaluated["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-7)  # a float32
    assert evaluated["num_examples"] == NUM_HELD_OUT
    assert accuracy > 0.5  # it has learnt


def test_predictions_are_made_in_the_precision_of_the_run() -> None:
    train_run("run", "--set", "run.precision=bfloat16")
    rows = run_command("predict", "run", "--json").report["predictions"]
    result = np.array([row["outputs"] for row in rows], dtype=np.float32)
    exact, _, _ = by_hand("run", [row["example"] for row in rows])
    assert np.all(result.view(np.uint32) & 0xFFFF == 0)  # bfloat16: the upper half of a float32
    assert np.linalg.norm(result - exact) < 0.01 * np.linalg.norm(exact)  # 8 bits: 2^-8


def test_the_oracle_tells_another_run_apart() -> None:
    train_run()
    train_run("other", "--set", "run.seed=1")
    ids = [row["example"] for row in run_command("predict", "run", "--json").report["predictions"]]
    loss = run_command("evaluate", "run", "--json").report["loss"]
    assert abs(by_hand("other", ids)[1] - loss) > 100 * FLOAT32


def test_the_two_parts_make_up_the_data() -> None:
    train_run()
    parts = {
        part: run_command("predict", "run", "--split", part, "--json").report["predictions"]
        for part in ("train", "held_out")
    }
    assert len(parts["train"]) == NUM_TRAIN
    ids = [row["example"] for rows in parts.values() for row in rows]
    assert sorted(ids) == list(range(NUM_TRAIN + NUM_HELD_OUT))
    classes = load_digits().target
    assert all(row["target"] == classes[row["example"]] for row in parts["train"])


def test_predictions_are_lines_of_json_in_a_file() -> None:
    train_run()
    run_command("predict", "run", "--out", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert rows == run_command("predict", "run", "--json").report["predictions"]


@pytest.mark.slow
def test_equal_runs_in_two_folders_have_one_digest_and_another_seed_has_another() -> None:
    first, second = train_run("first"), train_run("second")
    other = train_run("other", "--set", "run.seed=1")
    assert digest(first) == digest(second)
    assert digest(first) != digest(other)
    assert len(digest(first)) == 64


@pytest.mark.slow
def test_resuming_with_more_epochs_equals_one_run_of_as_many() -> None:
    train_run("whole", "--set", "run.epochs=20", "--set", "optimizer.args={momentum=0.9}")
    train_run("parts", "--set", "run.epochs=7", "--set", "optimizer.args={momentum=0.9}")
    assert digest("whole") != digest("parts")
    run_command("resume", "parts", "--set", "run.epochs=20")
    assert digest("whole") == digest("parts")
    assert "epochs = 20" in Path("parts/recipe.toml").read_text()
    assert run_command("verify", "parts", "--json").report["step"] == 20 * STEPS_AN_EPOCH


def test_a_schedule_goes_on_where_it_was() -> None:
    schedule = ("--set", "schedule.name=step", "--set", "schedule.at=[2000, 4000]")
    train_run("whole", "--set", "run.epochs=4", *schedule)
    train_run("parts", *schedule)
    train_run("constant", "--set", "run.epochs=4")
    run_command("resume", "parts", "--set", "run.epochs=4")
    assert digest("whole") == digest("parts") != digest("constant")


def test_a_micro_batch_may_change_on_resume_and_the_weights_stay_equal() -> None:
    train_run("whole", "--set", "run.epochs=2")
    train_run("parts")
    run_command("resume", "parts", "--set", "run.epochs=2", "--set", "batch.micro_batch=100")
    whole, parts = (run_command("evaluate", run, "--json").report for run in ("whole", "parts"))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=FLOAT32)


def test_resuming_a_finished_run_says_so_and_changes_no_checkpoint() -> None:
    train_run()
    before = digest("run")
    ended = run_command("resume", "run")
    assert "complete already" in ended.out
    assert "anybatch resume run --set run.epochs=" in ended.out
    assert digest("run") == before


def test_fewer_epochs_than_made_are_refused_and_the_recipe_stays() -> None:
    train_run("run", "--set", "run.epochs=2")
    before = Path("run/recipe.toml").read_text()
    assert "made 12 updates, more than the 6" in refuse("resume", "run", "--set", "run.epochs=1")
    assert Path("run/recipe.toml").read_text() == before


def test_resume_records_each_session_and_what_changed() -> None:
    train_run()
    run_command("resume", "run", "--set", "run.epochs=2")
    rows = [json.loads(line) for line in Path("run/records.jsonl").read_text().splitlines()]
    sessions = [row for row in rows if row["kind"] == "session"]
    assert [row["step"] for row in sessions] == [0, STEPS_AN_EPOCH, STEPS_AN_EPOCH]
    assert "epochs = 2" in next(row["recipe"] for row in sessions if "recipe" in row)
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert steps == list(range(2 * STEPS_AN_EPOCH))


def test_every_command_prints_one_json_object_with_json() -> None:
    result = run_command("train", write_recipe(Path()), "--out", "run", "--json").report
    assert result["complete"] is True
    assert result["step"] == STEPS_AN_EPOCH
    assert result["held_out"]["accuracy"] > 0.5
    assert run_command("resume", "run", "--json").report["complete"] is True
    assert run_command("evaluate", "run", "--split", "train", "--json").report["split"] == "train"
    assert run_command("predict", "run", "--out", "p", "--json").report["examples"] == NUM_HELD_OUT
    assert run_command("export", "run", "--json").report["tensors"] == 2
    assert set(run_command("verify", "run", "--json").report) >= {"step", "digest", "ok"}


def test_a_mistake_with_json_is_an_object_and_a_message() -> None:
    ended = anybatch("evaluate", "nowhere", "--json")
    assert ended.code == 2
    assert ended.report["ok"] is False
    assert ended.err == f"anybatch: {ended.report['error']}\n"


def test_tables_name_each_value_and_the_end_names_the_next_command() -> None:
    ended = run_command("train", write_recipe(Path()), "--out", "a run [1]")
    assert "epoch 1/1  loss" in ended.out
    assert "run       a run [1]\n" in ended.out
    assert "training  epoch 1  loss " in ended.out
    assert "anybatch predict 'a run [1]'" in ended.out
    assert "ok           yes" in run_command("verify", "a run [1]").out
    assert "accuracy 0." in run_command("evaluate", "a run [1]").out


def test_runs_without_a_folder_are_numbered() -> None:
    recipe = write_recipe(Path())
    for number in (1, 2):
        result = run_command("train", recipe, "--json").report
        assert result["run"] == f"runs/recipe-{number}"


def test_a_run_trains_on_from_its_own_recipe() -> None:
    train_run("first", "--set", "optimizer.lr=0.25")
    run_command("train", "first/recipe.toml", "--out", "second")
    assert digest("first") == digest("second")
    assert Path("first/recipe.toml").read_text() == Path("second/recipe.toml").read_text()


def test_the_number_of_ranks_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "train", write_recipe(Path()), "--ranks", 1, "--out"
    assert run_command(*command, "run")  # the control
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "--ranks is set under torchrun. Leave it out" in refuse(*command, "other")
    assert not Path("other").exists()
