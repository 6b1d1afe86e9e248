"""Spikes of a run of the command line: [spikes], `show` and `explain --spike`.

Oracle: the records of the run, and a training of the same recipe without the watch.
"""

import json
import math
from typing import Any

import pytest

from anybatch.recipe.schema import SpikesSection
from anybatch.runs import checkpoints
from anybatch.runs.records import read_records
from command_line import anybatch, refuse, run_command

BAD = 40


def write(folder: Any) -> Any:
    """Write a table with one wrong row, and a recipe for it."""
    lines = [
        f"{math.sin(i):.4f},{math.cos(3 * i):.4f},{int(math.sin(i) > 0)}\n" for i in range(400)
    ]
    lines[BAD] = "90.0,-70.0,0\n"
    (folder / "rows.csv").write_text("x1,x2,y\n" + "".join(lines))
    (folder / "recipe.toml").write_text(f"""
[model]
name = "softmax_regression"
args = {{ inputs = [2], classes = 2 }}
[data]
name = "csv"
args = {{ path = "{folder}/rows.csv", target = "y" }}
held_out = 0.05
[objective]
loss = "cross_entropy"
[optimizer]
name = "sgd"
lr = 0.01
[batch]
size = 8
[run]
epochs = 3
threads = 1
""")
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("spikes")
    ended = anybatch("train", write(folder), "--out", folder / "run", "--set", "spikes.window=30")
    assert ended.code == 0
    assert "Above" in ended.err
    assert f"example {BAD}" in ended.err
    return folder / "run"


def list_rows(run: Any) -> list[dict[str, Any]]:
    return [row for row in read_records(run / "records.jsonl") if row["kind"] == "spike"]


def test_the_newest_spike_is_explained(run: Any, tmp_path: Any) -> None:
    rows = list_rows(run)
    assert BAD in [example["id"] for example in rows[-1]["examples"]]
    out = run_command("explain", run, "--spike", "--json", "--out", tmp_path / "page.html").out
    result = json.loads(out)
    assert result["step"] == rows[-1]["step"]
    assert "is a spike" in result["reason"]
    assert f"Behind it: example {BAD}" in result["reason"]
    assert result["reason"] in (tmp_path / "page.html").read_text()


def test_an_earlier_spike_is_explained_by_its_step(run: Any, tmp_path: Any) -> None:
    row = list_rows(run)[0]
    page = ("--json", "--out", tmp_path / "page.html")
    result = json.loads(run_command("explain", run, "--spike", "--step", row["step"], *page).out)
    assert result["step"] == row["step"]
    message = refuse("explain", run, "--spike", "--step", 1, "--out", tmp_path / "other.html")
    assert "no record of a spike at step 1" in message
    assert f"at the steps {', '.join(str(r['step']) for r in list_rows(run)[-5:])}" in message


def test_show_counts_the_spikes(run: Any) -> None:
    result = json.loads(run_command("show", run, "--json").out)
    assert result["spikes"] == len(list_rows(run))
    assert result["newest_spike"] == list_rows(run)[-1]["step"]
    assert any(line.endswith("--spike") for line in result["next"])


def test_a_run_without_a_watch_has_no_spike_and_the_same_weights(run: Any, tmp_path: Any) -> None:
    run_command("train", write(tmp_path), "--out", tmp_path / "run")
    message = refuse("explain", tmp_path / "run", "--spike", "--out", tmp_path / "page.html")
    assert "--set spikes.window=100" in message
    digests = [
        checkpoints.find_newest(folder / "checkpoints").checkpoint.digest  # type: ignore[union-attr]
        for folder in (run, tmp_path / "run")
    ]
    assert digests[0] == digests[1]
    assert "spikes" not in json.loads(run_command("show", tmp_path / "run", "--json").out)
    keys = ("--set", "run.epochs=5", "--set", "spikes.window=40")
    assert anybatch("resume", tmp_path / "run", *keys).code == 0
    assert list_rows(tmp_path / "run")


def test_a_factor_without_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="factor needs window"):
        SpikesSection(factor=3.0)
