"""Parts of a run that hold something else than a run writes are refused, seals made right or not.

Oracle: the message. Control: the same part as a run writes it is read.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anybatch.errors import RunError
from anybatch.runs.checksums import Checksums, seal
from anybatch.runs.ledger_files import read_ledger
from anybatch.runs.state import TrainingState


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
