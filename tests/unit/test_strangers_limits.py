"""Every bad file ends in one message, never in a traceback, a hang or a full memory.

The oracle is the command line in a process of its own: exit code 2 and a time limit.
"""

import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anybatch.errors import AnybatchError, CheckpointError, DataError, RecipeError, RunError
from anybatch.limits import DEPTH, UNPACKED_BYTES, check_unpacked, read_json
from anybatch.recipe.files import read_recipe
from anybatch.runs import checkpoints
from anybatch.runs.records import read_records
from anybatch.runs.run import Run
from strangers import anybatch, run_refused, write

SECONDS = 120  # for a command that must not hang


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 5000 + "]" * 5000, "nested deeper"),
        ("x = " + '{a="b",c=' * 3000 + "1" + "}" * 3000, "nested deeper"),
        ("a." * 100_000 + "a = 1", "nested deeper"),
        ("x = {" + '"a" . ' * 30_000 + "a = 1}", "nested deeper"),
        ("x = " + "[" * 100 + "]" * 100, "nested deeper"),
        ("x = " + "9" * 5000, "is not TOML"),
        ("x = 1\nx = 2", "is not TOML"),
        ("[run]\nepochs = 99999999999999999999", r"run\.epochs: expected an integer of at most 64"),
        ("[model.args]\na = [1, 0x1ffffffffffffffffff]", r"model\.args\.a\.1: expected an integer"),
        ("#" * (2**20 + 1), "larger than 1048576 bytes"),
        ("\n".join(f"k{i} = {i}" for i in range(5000)), "and 4986 more"),
        ("run = '" + "x" * 100_000 + "'", r"got 'x{199}\.\.\.\."),
    ],
)
def test_a_recipe_that_is_too_much_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(tmp_path / "recipe.toml")
    assert len(str(caught.value)) < 5000


def test_a_recipe_of_ordinary_depth_is_read(tmp_path: Path) -> None:  # the control
    deep = "[" * 20 + "1" + "]" * 20
    path = write(tmp_path)
    path.write_text(path.read_text() + f"\n[order]\nargs = {{a.b.c.d = {deep}}}\n")
    assert read_recipe(path).order.args["a"]["b"]["c"]["d"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.threads": 100_000}, "run.threads = 100000. Expected at most"),
        ({"data.workers": 100_000}, "data.workers = 100000. Expected at most"),
        ({"run.device": "xla"}, "run.device 'xla'"),
        ({"run.device": "hpu:77"}, "run.device 'hpu:77'"),
        ({"data.args": {"path": "pipe", "target": "y"}}, "is a named pipe"),
        ({"data.args": {"path": "/dev/zero", "target": "y"}}, "is a device"),
        ({"data.name": "npz", "data.args": {"path": "pipe"}}, "is no file"),
        ({"data.name": "text", "data.args": {"path": "pipe"}}, "is a named pipe"),
        ({"model.weights": "pipe"}, "is no file"),
        ({"model.args": {"inputs": [2**40], "classes": 2}}, "not enough memory|allocate"),
    ],
)
def test_a_recipe_that_asks_for_too_much_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    import re

    write(tmp_path, changes)
    os.mkfifo(tmp_path / "pipe")
    assert re.search(message, run_refused(tmp_path, "train", "recipe.toml", seconds=SECONDS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pipe",), "is a named pipe"),
        (("/dev/zero",), "is a device"),
        (("recipe.toml", "--set", "a.b=" + "[" * 5000), "nested deeper"),
        (("recipe.toml", "--set", "run.epochs=" + "9" * 5000), "--set"),
        (("recipe.toml", "--ranks", "100000"), "--ranks 100000. Expected at most"),
        (("recipe.toml", "--patience", "inf"), "--patience inf. Expected seconds"),
        (("recipe.toml", "--patience", "1e300"), "--patience 1e+300. Expected seconds"),
    ],
)
def test_a_command_that_asks_for_too_much_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    write(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert message in run_refused(tmp_path, "train", *arguments, seconds=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [("RANK", "x"), ("RANK", "5"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "99999")],
)
def test_ranks_and_ports_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    write(tmp_path)
    sound = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, stored in (sound | {variable: value}).items():
        monkeypatch.setenv(name, stored)
    output = run_refused(tmp_path, "train", "recipe.toml", seconds=SECONDS)
    assert f"{variable} = '{value}' in the environment" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "nested deeper"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "nested deeper"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("NaN", "NaN is no JSON"),
        ("9" * 5000, "Exceeds the limit"),
        (b"\xff", "decode"),
    ],
)
def test_json_that_is_too_much_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(text)


def test_ordinary_json_is_read() -> None:  # the control
    assert read_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    "line", ["[" * 9999, '{"kind": 1, "step": 0}', '{"kind": "a", "step": "x"}']
)
def test_records_of_a_stranger_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "records.jsonl").write_text(f"{line}\n")
    with pytest.raises(RunError, match=r"line 1: .* is no JSON object with 'kind' and 'step'"):
        read_records(tmp_path / "records.jsonl")


@pytest.mark.parametrize("name", ["records.jsonl", "lock", "checkpoints/step-000000000001"])
def test_a_run_with_a_fifo_is_refused(tmp_path: Path, name: str) -> None:
    Run(tmp_path / "run").close()
    file = tmp_path / "run" / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    os.mkfifo(file)
    with pytest.raises(RunError, match="is a named pipe"):
        Run(tmp_path / "run")


def idx_bomb(folder: Path) -> Callable[[], object]:
    from anybatch.data.idx import read_idx

    with gzip.open(folder / "bomb", "wb", compresslevel=1) as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 2**30))
        file.writelines(bytes(2**20) for _ in range(64))
    return lambda: read_idx(str(folder / "bomb"))


def npz_bomb(folder: Path) -> Callable[[], object]:
    from anybatch.data import load_npz

    with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.npy", bytes(2**26))
    return lambda: load_npz(str(folder / "bomb"))


def parquet_bomb(folder: Path) -> Callable[[], object]:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from anybatch.data import load_parquet

    table = arrow.table({"x": np.zeros(2**23), "y": np.zeros(2**23, np.int64)})
    parquet.write_table(table, folder / "bomb")
    return lambda: load_parquet(str(folder / "bomb"), "y")


def ledger_bomb(folder: Path) -> Callable[[], object]:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from anybatch.runs.ledger_files import read_ledger

    (folder / "run.json").write_text('{"format": 1}')
    (folder / "ledger").mkdir()
    ids = dict.fromkeys(("step", "epoch", "example"), np.zeros(2**23, np.int64))
    file = folder / "ledger/steps-000000000000-000000000001.parquet"
    parquet.write_table(arrow.table(ids), file)
    return lambda: read_ledger(folder)


@pytest.mark.parametrize("bomb", [idx_bomb, npz_bomb, parquet_bomb, ledger_bomb])
def test_a_file_that_unpacks_into_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: Callable[[Path], Callable[[], object]]
) -> None:
    """Lower the limit from 4 GiB to 32 MiB, so that the test needs little memory."""
    load = bomb(tmp_path)
    monkeypatch.setattr("anybatch.limits.UNPACKED_BYTES", 2**25)
    with pytest.raises(AnybatchError, match=r"that unpack into .* The limit is 33554432"):
        load()


def test_the_limit_on_what_is_unpacked_leaves_sound_files_alone() -> None:  # the control
    check_unpacked("x", 1, UNPACKED_BYTES, DataError)
    check_unpacked("x", 2**30, 100 * 2**30, DataError)
    with pytest.raises(DataError, match="unpack it yourself"):
        check_unpacked("x", 1, UNPACKED_BYTES + 1, DataError)


def deflate(folder: Path) -> bytes:
    """A file of torch.save whose archive is compressed."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


def widen(folder: Path) -> bytes:
    """A file with one number that stands for 2^40."""
    file = io.BytesIO()
    torch.save({"x": torch.zeros(1).expand(2**40)}, file)
    return file.getvalue()


def laughing(folder: Path) -> bytes:
    """A file with a list that holds a list ten times, which holds a list ten times, and so on."""
    result: list[Any] = []
    for _ in range(30):
        result = [result] * 10
    file = io.BytesIO()
    torch.save(result, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (deflate, "is compressed"),
        (widen, "is an expanded tensor"),
        (laughing, "unpack into more values"),
    ],
)
def test_a_checkpoint_that_unpacks_into_too_much_is_refused(
    tmp_path: Path, bomb: Callable[[Path], bytes], message: str
) -> None:
    import dataclasses
    import hashlib

    from anybatch.runs.manifest import MANIFEST, StoredFile, format_manifest

    result = checkpoints.write(tmp_path, step=1, state={"model": {}}, settings={})
    content = bomb(tmp_path)
    sha256 = hashlib.sha256(content).hexdigest()
    stored = StoredFile(name="model.pt", num_bytes=len(content), sha256=sha256)
    (result.path / "model.pt").write_bytes(content)
    (result.path / MANIFEST).write_bytes(
        format_manifest(dataclasses.replace(result, files=(stored,)))
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(checkpoints.verify(result.path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user", 5),
        ("model", None),
        ("optimizer", {"state": [], "param_groups": 3}),
        ("loss_scale", {"value": "x", "finite_in_a_row": 0, "skipped_in_a_row": 0}),
        ("body", {"is_trained": {}, "is_training": {"": "yes"}}),
        ("generators", {"torch": 1}),
    ],
)
def test_a_sound_checkpoint_of_an_odd_state_is_refused(key: str, value: object) -> None:
    from anybatch.runs.state import TrainingState

    model = torch.nn.Linear(2, 2)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state.restore(state.dump())  # the control
    with pytest.raises(AnybatchError, match="does not fit this model and optimiser"):
        state.restore(state.dump() | {key: value})


ESCAPE = "\x1b[31m\x1b]0;title\x07\u202e"


@pytest.mark.slow
def test_escape_sequences_of_names_are_shown_and_never_printed(tmp_path: Path) -> None:
    name = f"f{ESCAPE}[bold].csv"
    table = f"x1,x2,y\n1,{ESCAPE},0\n"
    (tmp_path / name).write_text(table)
    write(tmp_path, {"data.args": {"path": name, "target": "y"}})
    output = run_refused(tmp_path, "train", "recipe.toml")
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert "\\x1b[31m" in output
    assert "[bold].csv" in output  # neither taken for markup nor swallowed


@pytest.mark.slow
def test_escape_sequences_of_a_recipe_and_a_folder_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / f"runs{ESCAPE}[red]"
    penalty = [{"kind": "L2", "strength": 0.1, "name": f"p{ESCAPE}[bold]"}]
    write(tmp_path, {"objective.penalty": penalty})
    code, out, err = anybatch(tmp_path, "train", "recipe.toml", "--out", folder)
    assert (code, "\x1b" in out + err) == (0, False)
    assert "\\x1b[31m" in out
    assert "[red]" in out
    (tmp_path / f"{ESCAPE}[bold].toml").write_text("x = 1")
    output = run_refused(tmp_path, "train", f"{ESCAPE}[bold].toml")
    assert ("\x1b" in output, "[bold].toml" in output) == (False, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("run", ESCAPE), ("run", f"--{ESCAPE}"), (f"--{ESCAPE}=1",), (ESCAPE,)]
)
def test_escape_sequences_of_names_that_a_shell_puts_in_are_shown(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, out, err = anybatch(tmp_path, "show", *words)
    assert code == 2
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err
    assert "\\x1b[31m" in err


def test_a_table_and_a_terminal_show_no_escape_of_a_cell() -> None:
    from anybatch.cli import render

    file = io.StringIO()
    with redirect_stdout(file):  # `console.file` would stay at this test's stdout
        render.print_table([{f"name{ESCAPE}": f"[bold]{ESCAPE}", "other": 1}])
        render.console.print(f"text {ESCAPE}")
    assert "\x1b]0;" not in file.getvalue()
    assert "\u202e" not in file.getvalue()
    assert "\\x1b" in file.getvalue()
    assert "[bold]" in file.getvalue()


def test_trackers_get_no_escape_sequence() -> None:
    from anybatch.runs.trackers.protocol import list_numbers

    row = {"kind": "step", "step": 0, "loss": 1.0, "parts": {ESCAPE: 2.0}}
    (name,) = set(list_numbers(row)) - {"loss"}
    assert (name.isprintable(), name.startswith("parts/\\x1b[31m")) == (True, True)


def test_the_page_runs_no_script_of_a_name() -> None:
    from anybatch.report.packing import embed_json

    text = "</script><script>alert(1)</script><!--&amp;"
    result = embed_json({"name": text, text: 1})
    assert not set("<>&") & set(result)
    assert json.loads(result)["name"] == text  # and loses nothing
