"""Parts of a run that hold something else than a run writes are refused, seals made right or not.

Oracle: the message. Control: the same part as a run writes it is read.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anybatch.advice.trial import Outcome, read_outcome
from anybatch.errors import RunError
from anybatch.runs.checksums import Checksums, read_file_state, seal
from anybatch.runs.data_fingerprint import DATA, compute_fingerprint, get_fingerprint
from anybatch.runs.ledger_files import read_ledger
from anybatch.runs.state import TrainingState
from command_line import anybatch, refuse
from test_recipe_runs import start_run


def mark(folder: Path, states: Any) -> None:
    files = {"format": 2, "anybatch": "0.1.0", "others": [], "files": {"lock": states}}
    (folder / "run.json").write_bytes(seal(files))


@pytest.mark.parametrize("states", [[], [[0]], "ab", [["0", "a"]], [[-1, "a"]], [[0, 1]], None])
def test_a_state_of_another_kind_in_run_json_is_refused(tmp_path: Path, states: Any) -> None:
    mark(tmp_path, [None, [0, "a"]])
    assert Checksums.read(tmp_path).files == {"lock": [None, (0, "a")]}  # the control
    mark(tmp_path, states)
    with pytest.raises(RunError, match=r"run.json was not written by anybatch"):
        Checksums.read(tmp_path)


def test_a_folder_without_run_json_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run: it has no run.json"):
        Checksums.read(tmp_path)


@pytest.mark.parametrize("name", ["step", "epoch", "example", "loss"])
@pytest.mark.parametrize("column", [["a", "b"], [[1], [2]], [1, None]])
def test_a_ledger_with_other_columns_is_refused(tmp_path: Path, name: str, column: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "run.json").write_text(json.dumps({"format": 1}))
    (tmp_path / "ledger").mkdir()
    file = tmp_path / "ledger" / "steps-000000000000-000000000002.parquet"
    columns = {"step": [0, 1], "epoch": [0, 0], "example": [3, 4], "loss": [0.5, 1.0]}
    parquet.write_table(arrow.table(columns), file)
    assert read_ledger(tmp_path)["loss"].tolist() == [0.5, 1.0]  # the control
    parquet.write_table(arrow.table(columns | {name: column}), file)
    with pytest.raises(RunError, match="holds other columns than a run writes"):
        read_ledger(tmp_path)


def parts() -> TrainingState:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    return TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "path", ["__class__.training", "0.__class__.p", "0.__dict__", "0._forward_hooks", "gone.p"]
)
def test_a_checkpoint_changes_attributes_of_modules_alone(path: str) -> None:
    state = parts().dump()
    state["body"]["attributes"] = {"0.p": 0.25}
    mine = parts()
    mine.restore(state)
    assert mine.model[0].p == 0.25  # the control
    state["body"]["attributes"] = {path: 0.25}
    with pytest.raises(RunError, match="no such attribute that the body of a loop"):
        parts().restore(state)
    assert nn.Dropout().p == 0.5


def test_whether_a_parameter_is_trained_is_a_boolean() -> None:
    state = parts().dump()
    state["body"]["is_trained"]["1.weight"] = "no"
    with pytest.raises(RunError, match=r"whether 1\.weight is trained is a str"):
        parts().restore(state)


RUN_KEYS = {"run.epochs": 2, "observe.norms": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a ledger and evaluations."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start_run(folder, **RUN_KEYS)
    return folder


SPIKE = {"kind": "spike", "step": 1, "signal": "loss", "value": 2.0, "median": 1.0} | {
    "limit": 1.5,
    "examples": [{"id": 3, "loss": 2.0, "norm": None, "share": None, "findings": ["long"]}],
}


def rewrite_records(run: Path, kind: str, **fields: Any) -> None:
    """Change fields of the last row of a kind, and make the checksums right again."""
    file = run / "records.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if kind == "spike":
        rows.append(dict(SPIKE))
    last = [row for row in rows if row["kind"] == kind][-1]
    last |= fields
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checksums = Checksums.read(run)
    checksums.set_state(file, read_file_state(file))
    checksums.write()


@pytest.mark.fast(2)
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("step", {"step": 2**60}),
        ("step", {"step": -1}),
        ("step", {"epoch": "first"}),
        ("step", {"parts": [0.5]}),
        ("step", {"parts": {"data": "low"}}),
        ("step", {"loss": True}),
        ("step", {"seconds": [1]}),
        ("step", {"averages": 1}),
        ("step", {"lr": {}}),
        ("evaluation", {"split": 3}),
        ("evaluation", {"metrics": None}),
        ("spike", {"signal": "\x1b[2J"}),
        ("spike", {"value": "high"}),
        ("spike", {"median": [1]}),
        ("spike", {"examples": {}}),
        ("spike", {"examples": [{"id": "../../x"}]}),
        ("spike", {"examples": [{"id": 1, "findings": [2]}]}),
    ],
)
def test_records_of_other_fields_are_refused_by_each_command_that_shows_them(
    whole: Path, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    rewrite_records(run, kind, **fields)
    (name,) = fields
    for command in (["show", run], ["explain", run, "--out", tmp_path / "page.html"]):
        assert f"{name} = " in refuse(*command)
    assert anybatch("runs", tmp_path).out.count("damaged") == 1
    assert anybatch("resume", run, "--set", "run.epochs=3").code in (0, 2)


def test_records_as_the_run_wrote_them_are_shown(whole: Path, tmp_path: Path) -> None:
    """Control: of the test above."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    rewrite_records(run, "spike", median=0.5)
    rewrite_records(run, "step", loss=None)  # it was not finite
    for command in (["show", run], ["explain", run, "--out", tmp_path / "page.html"]):
        assert anybatch(*command).code == 0


@pytest.mark.parametrize(
    "fingerprint",
    [
        {"examples": 5},
        {"examples": "5", "kinds": {}, "contents": {}, "sample": "", "parts": {}, "files": {}},
        {"examples": 5, "kinds": [], "contents": {}, "sample": "", "parts": {}, "files": {}},
        {"examples": 5, "kinds": {}, "contents": {}, "sample": "", "parts": {}, "files": {"a": 1}},
        [1],
        "sha",
    ],
)
def test_a_fingerprint_of_another_form_is_refused(fingerprint: Any) -> None:
    sound = compute_fingerprint(torch.arange(5), files=[__file__])
    assert get_fingerprint({DATA: json.loads(json.dumps(sound))}) == sound  # the control
    assert get_fingerprint({}) is None
    with pytest.raises(RunError, match="holds a fingerprint of the data that anybatch does not"):
        get_fingerprint({DATA: fingerprint})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"steps": 0, "held_out": {}}', '{"steps": 1, "held_out": {"a": "b"}}']
)
def test_an_read_outcome_another_form_is_refused(tmp_path: Path, text: str) -> None:
    assert read_outcome(tmp_path) is None
    (tmp_path / "outcome.json").write_text('{"steps": 1, "held_out": {"loss": 0.5}}')
    assert read_outcome(tmp_path) == Outcome(steps=1, held_out={"loss": 0.5})  # the control
    (tmp_path / "outcome.json").write_text(text)
    with pytest.raises(RunError, match=r"outcome\.json was not written by anybatch"):
        read_outcome(tmp_path)


def test_a_cache_writes_through_no_link(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    from anybatch.data import load_parquet

    parquet.write_table(table({"x": [1.0, 2.0], "y": [0, 1]}), tmp_path / "rows.parquet")
    load_parquet(str(tmp_path / "rows.parquet"), "y", cache=True)
    (lock,) = (tmp_path / "rows.parquet.cache").glob(".*.lock")
    shutil.rmtree(tmp_path / "rows.parquet.cache" / lock.name[1:-5])  # so that it is made again
    (tmp_path / "outside").write_text("years of work")
    lock.unlink()
    lock.symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="is a link to"):
        load_parquet(str(tmp_path / "rows.parquet"), "y", cache=True)
    assert (tmp_path / "outside").read_text() == "years of work"
