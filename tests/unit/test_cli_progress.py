"""Progress bar of a session: what it shows in a terminal, and that logs stay free of it."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from anybatch.cli import session
from command_line import Terminal, run_command, write_recipe

EPOCHS, UPDATES, BATCH, LAST = 2, 10, 64, 24  # updates in all; examples of most, and of the last


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the time that the session sees, which goes on when it is told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def progress(step: int) -> Any:
    """Return the progress that training reports after an update."""
    ends = (step + 1) % (UPDATES // EPOCHS) == 0
    product = SimpleNamespace(
        step=step,
        epoch=step * EPOCHS // UPDATES,
        examples=BATCH * (step + 1) - (BATCH - LAST if step == UPDATES - 1 else 0),
        parts={"data": 2.0 / (step + 1), "L2": 0.5},
        gradient=SimpleNamespace(num_examples=BATCH),
        metrics={"accuracy": 0.5 + step / 100},
    )
    parts = {"data": 0.25, "L2": 0.5}
    result = SimpleNamespace(parts=parts, metrics={"accuracy": 0.75})
    evaluations = {"held_out": result} if ends else {}
    return SimpleNamespace(step=product, num_steps=UPDATES, evaluations=evaluations, stopped=None)


def frames(file: io.StringIO) -> Iterator[str]:
    """Yield the lines that a terminal has shown, without colours and cursor movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return (line for line in re.split(r"[\r\n]+", text) if line.strip())


def read_screen(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, console: Console, quiet: bool = False
) -> list[str]:
    """Return what a session of ten updates, half a second each, leaves on a console."""
    monkeypatch.setattr(session, "console", console)
    setup: Any = SimpleNamespace(
        recipe=SimpleNamespace(run=SimpleNamespace(epochs=EPOCHS)),
        split_loss=lambda parts, num_examples: {"loss": parts["data"], "penalty": parts["L2"]},
        list_figures=lambda evaluation: {"loss": evaluation.parts["data"], **evaluation.metrics},
    )
    with session._show_bar(setup, quiet) as bar:
        for step in range(UPDATES):
            clock.now += 0.5
            bar.update(progress(step))
            bar._bar.refresh()
    assert isinstance(console.file, io.StringIO)
    return list(frames(console.file))


EPOCH_LINES = [
    # The means of 2/1 .. 2/5 and of 2/6 .. 2/10; the penalty is added to neither.
    "epoch 1/2  loss 0.9133  penalty 0.5000  held out: loss 0.2500  accuracy 0.7500",
    "epoch 2/2  loss 0.2583  penalty 0.5000  held out: loss 0.2500  accuracy 0.7500",
]


def test_a_terminal_shows_loss_accuracy_time_left_and_examples_a_second(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    console = Console(file=Terminal(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    lines = read_screen(monkeypatch, clock, console)
    assert [line for line in lines if line.startswith("epoch")] == EPOCH_LINES
    bars = [line for line in lines if "/10" in line]
    result = [re.fullmatch(r"[━╸╺]+ +(\d+)/10 (.*) +(\S+) (\S+) examples/s *", bar) for bar in bars]
    third = next(match for match in result if match and match[1] == "3")
    assert third[2].strip() == "loss 0.6667  accuracy 0.5200"
    assert re.fullmatch(r"\d:\d\d:\d\d|-:--:--", third[3])
    assert third[4] == "128"  # 64 examples in half a second
    last = next(match for match in result if match and match[1] == "10")
    assert last[4] == "119"  # (8 * 64 + 24) in 4.5 seconds


def test_the_first_update_has_no_speed_yet(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    console = Console(file=Terminal(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    bars = [line for line in read_screen(monkeypatch, clock, console) if " 1/10 " in line]
    assert bars
    assert all("examples/s" not in line for line in bars)


@pytest.mark.parametrize(
    ("file", "environ"),
    [
        (io.StringIO, {}),
        (io.StringIO, {"FORCE_COLOR": "1", "TERM": "xterm"}),  # what log viewers set
        (Terminal, {"TERM": "dumb"}),
    ],
)
def test_a_log_has_a_line_an_epoch_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
    clock: SimpleNamespace,
    file: type[io.StringIO],
    environ: dict[str, str],
) -> None:
    console = Console(file=file(), width=100, highlight=False, _environ=environ)
    assert read_screen(monkeypatch, clock, console) == EPOCH_LINES


def test_with_json_there_is_neither(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    console = Console(file=Terminal(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    assert read_screen(monkeypatch, clock, console, quiet=True) == []


@pytest.mark.parametrize(("examples", "message"), [(1_234_567, "1,234,567"), (12, "12"), (3, "3")])
def test_speeds_are_told_in_full(examples: int, message: str) -> None:
    task: Any = SimpleNamespace(fields={"history": [(1.0, 100), (2.0, 100 + examples)]})
    assert session._Speed().render(task).plain == f"{message} examples/s"


def test_a_command_whose_output_is_a_file_writes_a_line_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run_command("train", write_recipe(Path()), "--set", "run.epochs=3", "--out", "run").out
    assert len(re.findall(r"^epoch \d/3  loss \d\.\d{4}  held out: .*$", out, re.M)) == 3
    assert "examples/s" not in out
    assert "\r" not in out
