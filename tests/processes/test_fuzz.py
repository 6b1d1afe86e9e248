"""Fuzzer notices what must not happen: tracebacks, hangs and processes that die.

Oracle: what the reader of the control writes down just before it misbehaves. A small part of
`make fuzz` reads damaged inputs of all that anybatch reads.
"""

import json
import os
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import pytest

from anybatch.errors import AnybatchError

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "fuzz.json"
SECURITY = ROOT / "SECURITY.md"
KINDS = ("traceback", "hang", "crash", "refused", "read")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/fuzz.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield import_module("fuzz")
    for name in {"fuzz", "fuzz_targets", "fuzz_inputs", "machine"} - before:
        sys.modules.pop(name, None)


def misbehaving(fuzz: Any, log: Path) -> Any:
    """Make a target whose reader does one of `KINDS`, and writes it down before."""

    def make_sound(folder: Path) -> None:
        (folder / "input").write_bytes(bytes([KINDS.index("read")]))

    def draw(content: bytes, random: Random) -> bytes:
        return bytes([random.choices(range(5), [4, 1, 1, 10, 10])[0]])

    def read(folder: Path) -> None:
        kind = KINDS[(folder / "input").read_bytes()[0]]
        with log.open("a") as file:
            file.write(f"{kind}\n")
        if kind == "traceback":
            raise RecursionError("a defect")
        if kind == "hang":
            time.sleep(60)
        if kind == "crash":
            os._exit(3)
        if kind == "refused":
            raise AnybatchError("as it should be")

    return fuzz.Target("misbehaving", 1000, make_sound, ("input",), draw, read)


@pytest.mark.parametrize("processes", [1, 2])
def test_tracebacks_hangs_and_crashes_are_counted(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    log = tmp_path / "log"
    target = misbehaving(fuzz, log)
    monkeypatch.setattr(fuzz, "LIMIT", 0.3)
    outcome = fuzz.fuzz(target, 60, 0, processes)
    happened = Counter(log.read_text().split())
    happened["read"] -= 1  # the sound input, before the others
    assert min(happened[kind] for kind in KINDS) > 0  # each kind is tried
    assert outcome.inputs == 60
    assert (outcome.tracebacks, outcome.hangs) == (happened["traceback"], happened["hang"])
    assert (outcome.crashes, outcome.refused) == (happened["crash"], happened["refused"])
    message = Counter(failure["kind"] for failure in outcome.failures)
    assert message == {kind: happened[kind] for kind in ("traceback", "hang", "crash")}
    assert outcome.read == happened["read"]


def test_a_failure_ends_with_1_and_is_repeated_by_its_number(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = misbehaving(fuzz, tmp_path / "log")
    monkeypatch.setattr(fuzz, "TARGETS", (target,))
    monkeypatch.setattr(fuzz, "LIMIT", 0.3)
    assert fuzz.main(["--inputs", "30", "--processes", "1"]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    failures = [json.loads(line) for line in lines if line.startswith('{"kind"')]
    number = next(one["input"] for one in failures if one["kind"] == "traceback")
    with pytest.raises(RecursionError, match="a defect"):
        fuzz.main(["--target", "misbehaving", "--only", str(number)])


def test_inputs_of_each_kind_are_read_or_refused(fuzz: Any) -> None:
    for package in ("pyarrow", "safetensors", "tomli_w"):
        pytest.importorskip(package)
    assert sum(target.share for target in fuzz.TARGETS) == 1000
    assert fuzz.main(["--inputs", "1500", "--seed", "16", "--processes", "1"]) == 0


def test_the_record_is_of_a_million_inputs_as_the_page_says() -> None:
    record = json.loads(RECORD.read_text())
    assert record["failures"] == 0
    assert sum(target["inputs"] for target in record["targets"].values()) == 1_000_000
    assert "`make fuzz` reads a million damaged and hostile files" in SECURITY.read_text()
