"""Each command that reads data for a run refuses other data, and names what differs.

The oracle is the file that the test changes; the control is the same command before the change.
"""

import json
import os
import shutil

import pytest

from anybatch.runs import checkpoints
from command_line import anybatch, files_of, refuse, run_command, write_recipe

COMMANDS = {
    "resume": ["--set", "run.epochs=4"],
    "evaluate": [],
    "predict": ["--out", "predictions.jsonl"],
    "export": ["--out", "weights.safetensors"],
    "explain": ["--out", "page.html"],
    "advise": ["--updates", "2", "--examples", "40"],
    "examples": [],
    "verify": [],
}


def write_rows(path, *, scale=1.0, order=1, label=None, n=200):
    rows = [((i % 17 - 8) / 8, (i * 7 % 23 - 11) / 8) for i in range(n)]
    lines = [f"{scale * a},{scale * b},{int(a + b > i % 5 - 2)}" for i, (a, b) in enumerate(rows)]
    if label is not None:
        lines[label] = lines[label][:-1] + str(1 - int(lines[label][-1]))
    path.write_text("x1,x2,y\n" + "\n".join(lines[::order]) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working folder, with a recipe, its data and a run."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.csv")
    write_recipe(
        tmp_path,
        model={"args": {"inputs": [2], "classes": 2}},
        data={"name": "csv", "args": {"path": "rows.csv", "target": "y"}, "stratify": False},
        batch={"size": 20},
        observe={"norms": True},
        run={"epochs": 2, "bitwise": True},
    )
    run_command("train", "recipe.toml", "--out", "run")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_other_data_are_refused_and_accepted_where_one_says_so(folder, command):
    before = files_of(folder / "run")
    write_rows(folder / "rows.csv", label=60)
    message = refuse(command, "run", *COMMANDS[command])
    assert "example 60 of 200 sampled differs" in message
    assert "--accept-data" in message
    assert files_of(folder / "run") == before
    assert anybatch(command, "run", *COMMANDS[command], "--accept-data").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_data_are_none_to_refuse(folder, command):
    write_rows(folder / "rows.csv")  # written anew, with the same rows
    assert run_command(command, "run", *COMMANDS[command]).code == 0


def test_explain_refuses_other_data_before_the_first_checkpoint_too(folder):
    at = ["explain", "run", "--step", "2"]  # the run has checkpoints after 8 and 16 updates
    run_command(*at, "--out", "page.html")
    write_rows(folder / "rows.csv", label=60)
    assert "example 60 of 200 sampled differs" in refuse(*at, "--out", "other.html")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"order": -1}, "the examples are in another order"),
        ({"n": 190}, "there are 190 examples, and there were 200"),
        ({"scale": -100}, "of 200 sampled differ"),
    ],
)
def test_the_message_names_the_difference_and_the_file(folder, change, named):
    size = (folder / "rows.csv").stat().st_size
    write_rows(folder / "rows.csv", **change)
    os.utime(folder / "rows.csv", (1e9, 1e9))
    message = refuse("evaluate", "run")
    assert named in message
    assert f"rows.csv has {(folder / 'rows.csv').stat().st_size:,} bytes, written 2001" in message
    assert f"it had {size:,}" in message


def test_a_file_of_the_same_name_elsewhere_is_no_stand_in(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    write_rows(folder / "elsewhere/rows.csv", label=3)
    monkeypatch.chdir(folder / "elsewhere")
    message = refuse("evaluate", "../run")
    assert f"Now {folder}/elsewhere/rows.csv is read" in message
    write_rows(folder / "elsewhere/rows.csv")  # the same content is as good
    run_command("evaluate", "../run")


def test_accepted_data_are_on_the_record_and_those_of_the_run_from_then_on(folder):
    write_rows(folder / "rows.csv", label=60)
    anybatch("resume", "run", "--set", "run.epochs=3", "--accept-data")
    rows = [json.loads(line) for line in (folder / "run/records.jsonl").read_text().splitlines()]
    accepted = [row["accepted"]["data"] for row in rows if row.get("accepted")]
    assert accepted == [["example 60 of 200 sampled differs"]]
    run_command("evaluate", "run")
    write_rows(folder / "rows.csv")
    assert "example 60" in refuse("evaluate", "run")


def test_an_older_run_goes_on_with_one_line(folder, monkeypatch):
    settings = "anybatch.runs.checkpoints.check_settings"
    plain = checkpoints.check_settings

    def without_fingerprint(tree):
        return {name: value for name, value in plain(tree).items() if name != "data_fingerprint"}

    monkeypatch.setattr(settings, without_fingerprint)
    anybatch("train", "recipe.toml", "--out", "old")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    write_rows(folder / "rows.csv", label=60)
    ended = anybatch("evaluate", "old")
    assert ended.code == 0
    assert ended.err.count("\n") == 1
    assert "old has no fingerprint of its data" in ended.err


def test_verify_says_whether_the_data_were_compared(folder):
    assert run_command("verify", "run", "--json").report["data"] == "the same"
    (folder / "rows.csv").rename(folder / "gone.csv")
    result = run_command("verify", "run", "--json").report
    assert result["data"].startswith("not compared: rows.csv cannot be read")
    assert "the data of run are not compared: rows.csv cannot be" in anybatch("examples", "run").err


@pytest.mark.fast(1)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_change_that_leaves_size_and_time_of_the_file_is_seen(folder, command):
    before = os.stat(folder / "rows.csv")
    write_rows(folder / "rows.csv", label=60)
    os.utime(folder / "rows.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(folder / "rows.csv").st_size == before.st_size
    assert "example 60 of 200 sampled differs" in refuse(command, "run", *COMMANDS[command])


@pytest.mark.slow
def test_a_comparison_goes_on_with_its_own_data_alone(folder):
    (folder / "other.toml").write_text((folder / "recipe.toml").read_text().replace("0.5", "0.25"))
    asked = ["compare", "recipe.toml", "other.toml", "--seeds", "2", "--jobs", "1", "--out", "pair"]
    assert anybatch(*asked).code == 0
    shutil.rmtree(folder / "pair/other/seed-1")
    write_rows(folder / "rows.csv", label=60)
    message = refuse(*asked)
    assert "pair compares runs on other data than these: example 60" in message
    assert not (folder / "pair/other/seed-1").exists()
    assert anybatch(*asked, "--accept-data", "--html", "page.html").code == 0
    text = "Other data were accepted since the first runs: example 60 of 200 sampled differs"
    assert text in (folder / "page.html").read_text()
    result = run_command(*asked, "--json").report  # these are the comparison's data from then on
    assert result["accepted"] == {"data": ["example 60 of 200 sampled differs"]}
    write_rows(folder / "rows.csv")
    assert "example 60" in refuse(*asked)


@pytest.mark.slow
def test_a_run_of_a_comparison_goes_on_with_other_data_where_one_says_so(folder):
    (folder / "other.toml").write_text((folder / "recipe.toml").read_text().replace("0.5", "0.25"))
    asked = ["compare", "recipe.toml", "other.toml", "--seeds", "2", "--jobs", "1", "--out", "pair"]
    assert anybatch(*asked).code == 0
    (folder / "pair/other/seed-1/outcome.json").unlink()  # as if it was stopped before its end
    write_rows(folder / "rows.csv", label=60)
    assert anybatch(*asked, "--accept-data").code == 0
    assert (folder / "pair/other/seed-1/outcome.json").exists()
