"""Train in the terminal: show progress, stop at signals, and say what to do next."""

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from types import FrameType
from typing import Any, NamedTuple

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from anybatch import distributed
from anybatch.cli.next_steps import describe_next_steps, format_command
from anybatch.cli.output import wrap_text
from anybatch.cli.render import console, make_progress, print_result
from anybatch.cli.signals import make_stop
from anybatch.displays import format_number
from anybatch.distributed import ProcessGroup
from anybatch.recipe import train as training
from anybatch.recipe.build import Setup, build
from anybatch.recipe.runs import create_run, find_newest
from anybatch.recipe.schema import Recipe
from anybatch.runs.run import Run
from anybatch.training.step import Step

__all__ = ["choose_folder", "summarize", "train_and_report", "train_seeds"]

_BAR_SECONDS = 0.05  # between two updates of the bar, which is drawn every 0.1


def choose_folder(name: str) -> Path:
    """Choose runs/NAME-1, or the next number that is free."""
    return next(p for n in count(1) if not (p := Path("runs") / f"{name}-{n}").exists())


class Session(NamedTuple):
    """Result of a training session."""

    result: dict[str, Any]
    signum: int | None  # of the signal that interrupted it
    next_steps: str


def train_and_report(
    setup: Setup,
    opening: AbstractContextManager[Run],
    *,
    as_json: bool,
    also: Mapping[str, Any] | None = None,
    group: ProcessGroup | None = None,
    tell_next: bool = True,
) -> None:
    """Train to the end or until Ctrl-C, which saves after the update at hand. Print the result.

    Args:
        opening: opens the run, and closes it.
        also: further items of the JSON.
        tell_next: whether to say what to do after a complete training.
    """
    session = _train(setup, opening, quiet=as_json, group=group)
    try:
        if as_json:
            _print_result({**(also or {}), **session.result}, as_json=True, group=group)
        else:
            _print_result(session.result, as_json=False, group=group)
            if tell_next or session.signum is not None:
                _print(session.next_steps, group)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"stopped. The run is saved in {session.result['run']}.") from None
    _exit_if_interrupted(session)


def train_seeds(
    recipe: Recipe,
    folder: Path,
    num_seeds: int,
    *,
    allow_code: bool,
    as_json: bool,
    group: ProcessGroup | None = None,
) -> None:
    """Train a recipe from several seeds, and print mean and spread of the held-out figures.

    Args:
        recipe: the recipe. It states the first seed; the others follow it.
        folder: the run of seed s is in folder/seed-s.
    """
    sessions: list[Session] = []
    for seed in range(recipe.run.seed, recipe.run.seed + num_seeds):
        seeded = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
        setup = distributed.call_together(partial(build, seeded, allow_code=allow_code), group)
        if not as_json:
            _print(f"seed {seed}", group)
        opening = create_run(seeded, folder / f"seed-{seed}", group)
        session = _train(setup, opening, quiet=as_json, group=group)
        if session.signum is not None and not as_json:
            _print(session.next_steps, group)
        _exit_if_interrupted(session)
        sessions.append(session)
    figures = [session.result["held_out"] for session in sessions]
    names = [name for name in figures[0] if name != "epoch"]
    summary = {name: summarize([figure[name] for figure in figures]) for name in names}
    result = {"runs": [session.result["run"] for session in sessions], "held_out": summary}
    _print_result(result, as_json=as_json, group=group)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Compute mean, standard deviation (n - 1) and range of a few values."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "spread": deviation, "min": min(values), "max": max(values)}


def _print_result(result: Mapping[str, Any], *, as_json: bool, group: ProcessGroup | None) -> None:
    if distributed.get_rank(group) == 0:
        print_result(result, as_json=as_json)


def _print(text: str, group: ProcessGroup | None) -> None:
    if distributed.get_rank(group) == 0:
        console.print(text)


def _train(
    setup: Setup, opening: AbstractContextManager[Run], *, quiet: bool, group: ProcessGroup | None
) -> Session:
    start = time.perf_counter()
    last: training.Progress | None = None
    quiet = quiet or distributed.get_rank(group) > 0
    with _stop_at_signals(setup, group) as stop, opening as run, _show_bar(setup, quiet) as bar:
        stop.folder = run.folder
        for last in training.train(setup, run):
            is_asked = stop.agree(group)  # before the bar, which fails on one rank at a closed pipe
            bar.update(last)
            if is_asked:
                last.step.save()
                break
    num_steps = setup.order.num_steps(setup.recipe.run.epochs)
    if last is not None:
        step = last.step.step + 1
    else:
        checkpoint = find_newest(run.folder, setup.recipe).checkpoint
        step = 0 if checkpoint is None else checkpoint.step
    is_interrupted = stop.signum is not None and step < num_steps
    result: dict[str, Any] = {"run": str(run.folder), "complete": step == num_steps, "step": step}
    if step < num_steps and not is_interrupted:  # [stop] ended it, and a warning says why
        result["stopped_early"] = True
    result |= bar.figures
    if last is not None:
        result["seconds"] = time.perf_counter() - start
    next_steps = describe_next_steps(
        setup, run.folder, is_interrupted=is_interrupted, is_complete=last is None
    )
    return Session(result, stop.signum if is_interrupted else None, next_steps)


def _exit_if_interrupted(session: Session) -> None:
    if session.signum is not None:
        raise typer.Exit(128 + session.signum)


class _Stop:
    """Signal handler that notes the first signal. A second one stops at once."""

    signum: int | None = None
    folder: Path | None = None  # of the run, once it is open

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def agree(self, group: ProcessGroup | None) -> bool:
        """Return whether any rank got a signal. All ranks then stop after the same update."""
        signum = distributed.all_reduce_max(self.signum or 0, group)
        if signum:  # otherwise, a signal that comes right now counts after the next update
            self.signum = signum
        return bool(signum)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None or self.folder is None:
            raise make_stop(signum)
        self.signum = signum
        if not self._quiet:
            print("\nstopping after this update; once more stops at once", file=sys.stderr)


@contextmanager
def _stop_at_signals(setup: Setup, group: ProcessGroup | None) -> Iterator[_Stop]:
    """Let Ctrl-C and termination ask for a stop after the update at hand."""
    stop = _Stop(quiet=distributed.get_rank(group) > 0)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt as interrupt:
        if stop.folder is None or not stop.folder.exists():
            raise
        command = format_command("resume", setup.recipe, stop.folder)
        raise type(interrupt)(
            f"stopped at once. Continue from the last checkpoint: {command}"
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Speed(ProgressColumn):
    """Column with the examples a second over the last updates."""

    def render(self, task: Task) -> Text:
        """Render the speed. `task.fields["history"]` has (seconds, examples) after each update."""
        history = task.fields["history"]
        if len(history) < 2:
            return Text()
        (start, first), (now, last) = history[0], history[-1]
        speed = (last - first) / (now - start)
        return Text(f"{format_number(speed) if speed < 10 else format(speed, ',.0f')} examples/s")


class _Bar:
    """A line for each epoch and, on a terminal, a progress bar below.

    The loss is that of the data: a mean over the updates of the epoch so far. The penalty is a
    figure of its own.
    """

    def __init__(self, setup: Setup, bar: Progress, quiet: bool) -> None:
        self._setup = setup
        self._quiet = quiet
        self._bar = bar
        self._history: deque[tuple[float, int]] = deque(maxlen=100)
        self._task = bar.add_task("", total=None, now="", history=self._history)
        self._epoch = 0
        self._latest: Step | None = None
        self._last_time = -math.inf  # when the bar was updated
        self._losses: list[dict[str, float]] = []  # of each update of the epoch
        self._evaluations: dict[str, dict[str, float]] = {}  # the latest of each split

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Latest figures of each split, with their epoch."""
        if not self._losses:
            return {}
        means = {name: mean(one[name] for one in self._losses) for name in self._losses[0]}
        return {"training": {"epoch": self._epoch, **means}, **self._evaluations}

    def update(self, progress: training.Progress) -> None:
        """Show one update and, after the last of an epoch, the epoch."""
        step, epoch = progress.step, progress.step.epoch + 1
        if self._bar.tasks[0].total is None:  # a resumed run has made updates before
            self._bar.reset(self._task, total=progress.num_steps, completed=step.step)
        if self._epoch != epoch:
            self._losses.clear()
        self._epoch = epoch
        self._losses.append(self._setup.split_loss(step.parts, step.gradient.num_examples))
        for split, evaluation in progress.evaluations.items():
            self._evaluations[split] = {"epoch": epoch, **self._setup.list_figures(evaluation)}
        self._latest, now = step, time.perf_counter()
        self._history.append((now, step.examples))
        if now >= self._last_time + _BAR_SECONDS:
            self._last_time = now
            self.update_bar()
        if progress.evaluations and not self._quiet:
            self._print_epoch(epoch, progress.evaluations)

    def update_bar(self) -> None:
        """Tell the bar of the latest update, for when it is drawn next."""
        if self._latest is not None:
            loss = format_number(self._losses[-1]["loss"])
            now = f"loss {loss}{_format_figures(self._latest.metrics)}"
            self._bar.update(self._task, completed=self._latest.step + 1, now=now)

    def _print_epoch(self, epoch: int, splits: Iterable[str]) -> None:
        epochs = self._setup.recipe.run.epochs
        line = f"epoch {epoch:>{len(str(epochs))}}/{epochs}"
        figures = self.figures
        line += _format_figures(figures["training"])
        for split in splits:
            line += f"  {split.replace('_', ' ')}:{_format_figures(figures[split])[1:]}"
        self._bar.console.print(wrap_text(line, self._bar.console.file))


@contextmanager
def _show_bar(setup: Setup, quiet: bool) -> Iterator[_Bar]:
    columns = (
        BarColumn(bar_width=8),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[now]}", markup=False, table_column=Column()),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Speed(table_column=Column(no_wrap=True)),
    )
    with make_progress(console, *columns, quiet=quiet) as bar:
        progress = _Bar(setup, bar, quiet)
        try:
            yield progress
        finally:
            progress.update_bar()


def _format_figures(figures: Mapping[str, float]) -> str:
    return "".join(
        f"  {name.replace('_', ' ')} {x:.4f}" for name, x in figures.items() if name != "epoch"
    )
