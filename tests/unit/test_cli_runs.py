"""`anybatch recipes`, `runs` and `show`.

Oracle: the recipes' files, and the records of a run added up by a loop.
"""

import fcntl
import json
from pathlib import Path

import pytest
import torch

import anybatch as ab
from command_line import refuse, run_command, write_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PENALTY = {"loss": "cross_entropy", "penalty": [{"kind": "L2", "strength": 0.1}]}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def records(run: str, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in Path(run, "records.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_every_shipped_recipe_is_listed_with_the_head_of_its_file() -> None:
    listed = run_command("recipes").out
    result = {
        row["name"]: row["summary"] for row in run_command("recipes", "--json").report["recipes"]
    }
    assert set(result) == {file.stem for file in RECIPES.glob("*.toml")}
    for name, summary in result.items():
        text = RECIPES.joinpath(f"{name}.toml").read_text()
        head = text.replace("\n# ", " ").splitlines()[0]
        assert f"# {summary}" == head
        assert any(
            line.startswith(f"{name} ") and summary[:20] in line for line in listed.split("\n")
        )


def test_a_run_is_described_by_data_loss_and_penalty_apart() -> None:
    run_command("train", write_recipe(Path(), objective=PENALTY), "--set", "run.epochs=3")
    result = run_command("show", "runs/recipe-1", "--json").report
    last = [row for row in records("runs/recipe-1", "step") if row["epoch"] == 2]
    data = sum(row["parts"]["data"] for row in last) / len(last)
    # Tolerance: sums of six numbers in float64.
    assert result["training"]["loss"] == pytest.approx(data, rel=1e-12)
    total = sum(row["loss"] for row in last) / len(last)
    assert result["training"]["penalty"] == pytest.approx(total - data, rel=1e-6)
    assert total - data > 1e-3  # control: the two losses differ
    held_out = records("runs/recipe-1", "evaluation")[-1]
    assert result["held_out"]["loss"] == held_out["parts"]["data"] != held_out["loss"]
    assert (result["state"], result["epoch"], result["epochs"]) == ("complete", 3, 3)
    evaluated = run_command("evaluate", "runs/recipe-1", "--json").report
    assert evaluated["loss"] == result["held_out"]["loss"]
    assert evaluated["penalty"] == pytest.approx(held_out["parts"]["L2"], rel=1e-12)


def test_train_tells_the_same_figures_as_show() -> None:
    recipe = write_recipe(Path(), objective=PENALTY)
    trained = run_command("train", recipe, "--set", "data.validation=0.2", "--json").report
    display = run_command("show", trained["run"], "--json").report
    for part in ("training", "validation", "held_out"):
        assert trained[part] == pytest.approx(display[part], rel=1e-12)
        assert trained[part]["epoch"] == 1


def test_a_loss_under_sum_is_told_per_example_too() -> None:
    objective = {"loss": "cross_entropy", "reduction": "sum"}
    sections = {"objective": objective, "batch": {"size": 500, "last": "keep"}}
    recipe = write_recipe(Path(), **sections, optimizer={"name": "sgd", "lr": 0.0001})
    output = run_command("train", recipe)
    display = run_command("show", "runs/recipe-1", "--json").report
    steps = records("runs/recipe-1", "step")
    sizes = [500, 500, 438]  # of 1,438 examples
    by_hand = sum(row["parts"]["data"] / n for row, n in zip(steps, sizes, strict=True)) / 3
    held_out = records("runs/recipe-1", "evaluation")[-1]["parts"]["data"] / 359
    assert display["training"]["loss_per_example"] == pytest.approx(by_hand, rel=1e-12)
    assert display["held_out"]["loss_per_example"] == pytest.approx(held_out, rel=1e-12)
    text = " ".join(output.out.split())
    assert f"loss per example {by_hand:.4f} held out: loss" in text
    assert f"loss per example {held_out:.4f}" in text
    evaluated = run_command("evaluate", "runs/recipe-1", "--json").report
    assert evaluated["loss_per_example"] == pytest.approx(held_out, rel=1e-6)
    assert display["held_out"]["loss"] > 300 * held_out  # the control: the sum is another number
    run_command("train", write_recipe(Path()), "--out", "runs/mean")
    mean = run_command("show", "runs/mean", "--json").report
    assert "loss_per_example" not in mean["training"] | mean["held_out"]


def test_states_and_what_to_do_next() -> None:
    run_command("train", write_recipe(Path()), "--out", "runs/done")
    folder = Path("runs/done")
    assert "anybatch explain runs/done\n" in run_command("show", folder).out
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_command("show", folder, "--json").report["state"] == "running"
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("epochs = 1", "epochs = 2"))
    display = run_command("show", folder).out
    assert "unfinished" in display
    assert "anybatch resume runs/done\n" in display


def test_runs_are_found_in_folders_and_a_damaged_one_is_told() -> None:
    run_command("train", write_recipe(Path()), "--seeds", 2, "--out", "runs/two")
    Path("runs/bad").mkdir()
    Path("runs/bad/run.json").write_text("{}")
    Path("runs/bad/records.jsonl").write_text('{"kind": "step", "step": 0}\n')
    Path("runs/notes").mkdir()
    lines = run_command("runs").out.splitlines()
    names = [line for line in lines if line.startswith("runs/")]
    assert sorted(names) == ["runs/bad", "runs/two/seed-0", "runs/two/seed-1"]
    messages = lines[lines.index("runs/two/seed-1") + 1]
    assert messages.startswith("  complete, epoch 1 of 1; loss ")
    assert "held out: loss " in messages
    assert "damaged: " in lines[lines.index("runs/bad") + 1]
    assert "no record of a run" in refuse("show", "runs/bad")
    result = run_command("runs", "--json").report["runs"]
    assert {one["state"] for one in result} == {"complete", "damaged"}


def test_a_run_of_a_script_is_shown_and_its_evaluation_is_explained() -> None:
    model, data = torch.nn.Linear(3, 2), (torch.rand(20, 3), torch.randint(2, (20,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def losses(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    order = ab.Order(20, batch_size=5, seed=0)
    for _ in ab.steps(
        model, ab.Objective(losses), optimizer, data, order=order, epochs=2, run="runs/script"
    ):
        pass
    result = run_command("show", "runs/script", "--json").report
    assert (result["state"], result["step"], result["epoch"]) == ("made by a script", 8, 2)
    for command in ("evaluate", "predict", "export", "resume", "explain"):
        message = refuse(command, "runs/script")
        assert "If a script made it" in message
        assert "call ab.evaluate" in message


def test_no_folder_and_no_runs_are_told_apart() -> None:
    assert "runs is no folder" in refuse("runs")
    Path("runs").mkdir()
    assert "There are no runs in runs yet." in run_command("runs").out
    assert "is no run. Expected a folder" in refuse("show", "runs")
