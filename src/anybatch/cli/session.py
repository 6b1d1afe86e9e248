"""A training session in the terminal: progress, signals, and what to do next."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anybatch.cli.render import console, number, show
from anybatch.recipe import runs
from anybatch.recipe.build import Built
from anybatch.training.evaluation import Evaluation
from anybatch.training.run import Run

__all__ = ["follow", "fresh_folder"]


class _Stop:
    """Whether the user has asked to stop; a second time stops at once."""

    requested = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def fresh_folder(name: str) -> Path:
    """runs/NAME-1, or the next number that is free."""
    return next(p for n in count(1) if not (p := Path("runs") / f"{name}-{n}").exists())


def follow(built: Built, run: Run, *, as_json: bool, also: Mapping[str, Any] | None = None) -> None:
    """Train to the end or to Ctrl-C, which finishes the step and saves it; print what was learnt.

    Args:
        also: what else the JSON is to hold.
    """
    last: runs.Progress | None = None
    held_out: Evaluation | None = None
    stopped = False
    with _until_signal() as stop, _bar(built, as_json) as bar:
        for progress in runs.train(built, run):
            last, held_out = progress, progress.held_out or held_out
            bar.update(progress)
            if stop.requested:
                stopped = progress.step.step + 1 < progress.num_steps
                progress.step.save()
                break
    found: dict[str, Any] = {"run": str(run.folder), "complete": not stopped}
    if last is not None:
        found |= {"step": last.step.step + 1, "loss": last.step.loss}
    if held_out is not None:
        found |= {"held_out": {"loss": held_out.loss, **held_out.metrics}}
    if as_json:
        show({**(also or {}), **found}, as_json=True)
        return
    show(found, as_json=False)
    _say_what_next(run.folder, stopped, made_any=last is not None)


def _say_what_next(folder: Path, stopped: bool, made_any: bool) -> None:
    if stopped:
        console.print(f"Stopped and saved. Continue with: anybatch resume {folder}")
    elif not made_any:
        console.print(
            f"The run is complete. To train on: anybatch resume {folder} --set run.epochs=..."
        )
    else:
        console.print(f"Look further: anybatch evaluate {folder}")


@contextmanager
def _until_signal() -> Iterator[_Stop]:
    """Ctrl-C and termination ask for a stop after the step at hand."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Bar:
    """A line an epoch, and below it a bar where there is a terminal."""

    def __init__(self, built: Built, bar: Progress, quiet: bool) -> None:
        self._epochs = built.recipe.run.epochs
        self._quiet = quiet
        self._bar = bar
        self._task = bar.add_task("", total=None, loss="", rate="")
        self._losses: list[float] = []

    def update(self, progress: runs.Progress) -> None:
        """Show one update, and at its end the epoch."""
        step = progress.step
        self._losses.append(step.loss)
        rate = f"{len(step.gradient.losses.values) / step.seconds:,.0f} examples/s"
        self._bar.update(
            self._task,
            total=progress.num_steps,
            completed=step.step + 1,
            loss=f"loss {number(step.loss)}" + _words(step.metrics),
            rate=rate,
        )
        if progress.held_out is None or self._quiet:
            return
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        self._bar.console.print(
            f"epoch {step.epoch + 1:>3}/{self._epochs}   loss {mean:.4f}   held out: "
            f"loss {progress.held_out.loss:.4f}{_words(progress.held_out.metrics)}"
        )


@contextmanager
def _bar(built: Built, quiet: bool) -> Iterator[_Bar]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield _Bar(built, bar, quiet)


def _words(metrics: Any) -> str:
    return "".join(f"   {name} {value:.4f}" for name, value in metrics.items())
