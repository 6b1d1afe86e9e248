"""A run's folder: claimed by one process, never taken from anybody else, whole on a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import anybatch as ab
from anybatch.errors import CheckpointError, DataError, RunError
from anybatch.runs import checkpoints
from anybatch.runs.checksums import seal
from anybatch.runs.records import read_records
from nested_states import same
from small_training import noting, rows, start, train_small


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER_PROCESS = """
import sys
import anybatch as ab
from anybatch.errors import RunError
try:
    ab.Run(sys.argv[1])
except RunError as error:
    print(error)
"""


def in_another_process(folder):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, folder], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_second_writer_is_refused_and_the_first_unharmed(tmp_path):
    training, results = start(), []

    def second(_, step):
        if step.step == 4:
            results.append(in_another_process(tmp_path))
            with pytest.raises(RunError, match="another loop of this one, writes into"):
                train_small(tmp_path)

    for step in training.loop(tmp_path):
        second(training, step)
    assert f"another process, or another loop of this one, writes into {tmp_path}" in results[0]
    assert same(training.state, train_small().state)
    assert len(rows(tmp_path)) == 9
    assert in_another_process(tmp_path) == ""  # control: now it may


@pytest.mark.parametrize("end", ["break", "error in the body", "error of the library", "Run alone"])
def test_the_folder_is_free_once_the_loop_is_left(tmp_path, end):
    error = None
    if end == "break":
        noting(ab.Run(tmp_path), 1)
    elif end == "error in the body":
        with pytest.raises(ZeroDivisionError, match="division") as error:
            train_small(tmp_path, lambda *_: 1 / 0)
    elif end == "error of the library":
        with pytest.raises(DataError, match="order is over 21 examples") as error:
            train_small(tmp_path, data=(start().model[0].weight,))
    else:
        ab.Run(tmp_path).close()
    train_small(tmp_path)
    del error  # a traceback held until here does not hold the folder


def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"exists and is no run.* Nothing in it was touched"):
        train_small(tmp_path)
    assert content(tmp_path) == {tmp_path / "thesis.txt": b"years of work"}
    with pytest.raises(RunError, match="exists and is no run"):
        train_small(tmp_path / "thesis.txt")
    with pytest.raises(RunError, match=r"is no folder to write into: .*Not a directory"):
        train_small(tmp_path / "thesis.txt" / "run")
    assert content(tmp_path) == {tmp_path / "thesis.txt": b"years of work"}


def test_an_empty_folder_or_one_cut_off_as_it_was_made_becomes_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "lock").touch()
    (tmp_path / "cut" / "run.json.partial").write_text('{"form')
    for name in ("empty", "cut", "deep/in/a/new/one"):
        train_small(tmp_path / name)
        assert len(rows(tmp_path / name)) == 9


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (
            seal({"format": 3, "anybatch": "9.0"}),
            "is a run of format 3. .* reads the formats 1 and 2. Use the version that made it: 9.0",
        ),
        (seal({"format": 2, "anybatch": "9.0"}), "run.json was not written by anybatch"),
        (b'{"format": 2, "anybatch": "9.0"}', "run.json is damaged: its checksum does not fit"),
        (b"{}", "run.json is damaged: its checksum does not fit"),
        (b"", "run.json is damaged: .* It must be a JSON object"),
        (b"[1]", "run.json is damaged: .* It must be a JSON object"),
        (b"\xff", "run.json is damaged: .* It must be a JSON object"),
    ],
)
def test_a_run_of_another_format_or_with_a_damaged_mark_is_left_alone(tmp_path, mark, message):
    noting(ab.Run(tmp_path), 4)
    (tmp_path / "run.json").write_bytes(mark)
    before = content(tmp_path)
    with pytest.raises(RunError, match=message):
        train_small(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 0}, r"checkpoint_every is 0\. It must be an integer of at least 1"),
        ({"checkpoint_every": 2.0}, r"checkpoint_every is 2\.0\. It must be an integer"),
        ({"checkpoint_every": True}, r"checkpoint_every is True\. It must be an integer"),
        ({"keep": 1}, r"keep is 1\. It must be an integer of at least 2"),
        ({"smoothing": 1}, r"smoothing is 1\. It must be a number from 0"),
        ({"smoothing": "0.9"}, r"smoothing is '0.9'\. It must be a number from 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(RunError, match=message):
        ab.Run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@contextmanager
def file_size_limit(num_bytes):
    """Files that may not grow beyond this, which the system reports like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("padding", "limit", "error", "message"),
    [
        (0, 3000, CheckpointError, "could not write .*step-0.*File too large.* resume"),
        (20_000, 21_000, RunError, "could not write .*records.jsonl.*File too large.* and resume"),
        (20_000, 15_000, RunError, "could not write .*records.jsonl.*File too large.* and resume"),
    ],
)
def test_on_a_full_disk_the_last_checkpoint_stays_and_the_run_goes_on_later(
    tmp_path, monkeypatch, padding, limit, error, message
):
    monkeypatch.chdir(tmp_path)  # no repository: what git tells would need room
    noting(ab.Run(tmp_path / "whole"))
    noting(ab.Run(tmp_path / "cut", checkpoint_every=2), 3)
    before = content(tmp_path / "cut" / "checkpoints")
    assert before
    run = ab.Run(tmp_path / "cut", checkpoint_every=3)
    run.record({"kind": "session", "step": 0, "padding": "x" * padding})
    with file_size_limit(limit), pytest.raises(error, match=message):
        noting(run)
    assert content(tmp_path / "cut" / "checkpoints") == before
    noting(ab.Run(tmp_path / "cut"))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_records_reach_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    events, write, fsync = [], checkpoints.write, os.fsync

    def watch(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def checkpoint(folder, **options):
        assert events[-1] == "records.jsonl"
        assert len(rows(tmp_path)) == options["step"]
        return write(folder, **options)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(checkpoints, "write", checkpoint)
    train_small(tmp_path)
    assert events.index("run.json.partial") < events.index("records.jsonl.partial")


def test_a_run_folder_is_what_its_documentation_says(tmp_path):
    train_small(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoints", "lock", "records.jsonl", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["format"] == 2


@pytest.mark.slow
def test_a_loop_that_is_left_open_when_the_program_ends_closes_its_run(tmp_path: Path) -> None:
    """Python has taken its modules apart by the time that it finalises a global generator."""
    script = tmp_path / "left.py"
    script.write_text(
        "import anybatch as ab, torch\n"
        "model, data = torch.nn.Linear(4, 1), torch.rand(32, 4)\n"
        "objective = ab.Objective(lambda m, x: m(x).square()[:, 0])\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "order = ab.Order(32, batch_size=8, seed=0)\n"
        "loop = ab.steps(model, objective, optimizer, data, order=order, epochs=5, run='run')\n"
        "next(loop), next(loop)\n"
    )
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    records = read_records(tmp_path / "run" / "records.jsonl")
    assert [row["step"] for row in records if row["kind"] == "step"] == [0, 1]
