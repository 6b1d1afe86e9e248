"""A training session in the terminal: progress, signals, and what to do next."""

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
from anybatch.cli.next_steps import next_steps, run_command
from anybatch.cli.render import console, number, show
from anybatch.cli.signals import stop_of
from anybatch.cli.wrapping import wrap
from anybatch.distributed import ProcessGroup
from anybatch.recipe import runs
from anybatch.recipe.build import Built, build
from anybatch.recipe.runs import begun
from anybatch.recipe.schema import Recipe
from anybatch.training.run import Run

__all__ = ["follow", "follow_seeds", "fresh_folder", "spread_of"]


def fresh_folder(name: str) -> Path:
    """runs/NAME-1, or the next number that is free."""
    return next(p for n in count(1) if not (p := Path("runs") / f"{name}-{n}").exists())


class Ended(NamedTuple):
    """How a session has ended."""

    found: dict[str, Any]  # what was learnt
    signum: int | None  # of the signal that interrupted it, if one did
    what_next: str


def follow(
    built: Built,
    opening: AbstractContextManager[Run],
    *,
    as_json: bool,
    also: Mapping[str, Any] | None = None,
    group: ProcessGroup | None = None,
    tell_next: bool = True,
) -> None:
    """Train to the end or to Ctrl-C, which finishes the update and saves it; print what was
    learnt.

    Args:
        built: what to train.
        opening: opens the run, and closes it.
        as_json: whether to print JSON.
        also: what else the JSON is to hold.
        group: the ranks that train together, of which the first prints; None: there is one.
        tell_next: whether to say what to do after a training that came to its end.
    """
    ended = _train(built, opening, quiet=as_json, group=group)
    try:
        if as_json:
            _show({**(also or {}), **ended.found}, as_json=True, group=group)
        else:
            _show(ended.found, as_json=False, group=group)
            if tell_next or ended.signum is not None:
                _print(ended.what_next, group)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"stopped. The run is saved in {ended.found['run']}.") from None
    _exit_if_interrupted(ended)


def follow_seeds(
    recipe: Recipe,
    folder: Path,
    num_seeds: int,
    *,
    allow_code: bool,
    as_json: bool,
    group: ProcessGroup | None = None,
) -> None:
    """Train a recipe from several initialisations, one after the other, and print mean and
    spread of what each is worth on the held-out data.

    Args:
        recipe: the first seed is its own; the others follow it.
        folder: the run of seed s is in folder/seed-s.
    """
    seeds = range(recipe.run.seed, recipe.run.seed + num_seeds)
    ended: list[Ended] = []
    for seed in seeds:
        own = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
        built = distributed.agreed(partial(build, own, allow_code=allow_code), group)
        if not as_json:
            _print(f"seed {seed}", group)
        opening = begun(own, folder / f"seed-{seed}", group)
        ended.append(_train(built, opening, quiet=as_json, group=group))
        if ended[-1].signum is not None and not as_json:
            _print(ended[-1].what_next, group)
        _exit_if_interrupted(ended[-1])
    worth = [one.found["held_out"] for one in ended]
    names = [name for name in worth[0] if name != "epoch"]
    spread = {name: spread_of([each[name] for each in worth]) for name in names}
    found = {"runs": [one.found["run"] for one in ended], "held_out": spread}
    _show(found, as_json=as_json, group=group)


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (n - 1) and range of a few values."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "spread": deviation, "min": min(values), "max": max(values)}


def _show(found: Mapping[str, Any], *, as_json: bool, group: ProcessGroup | None) -> None:
    if distributed.rank_of(group) == 0:
        show(found, as_json=as_json)


def _print(text: str, group: ProcessGroup | None) -> None:
    if distributed.rank_of(group) == 0:
        console.print(text)


def _train(
    built: Built,
    opening: AbstractContextManager[Run],
    *,
    quiet: bool,
    group: ProcessGroup | None,
) -> Ended:
    begun_at = time.perf_counter()
    last: runs.Progress | None = None
    quiet = quiet or distributed.rank_of(group) > 0
    with _until_signal(built, group) as stop, opening as run, _bar(built, quiet) as bar:
        stop.folder = run.folder
        for last in runs.train(built, run):
            is_asked = stop.is_agreed(group)  # before what may fail on one rank: a closed pipe
            bar.update(last)
            if is_asked:
                last.step.save()
                break
    num_steps = built.order.num_steps(built.recipe.run.epochs)
    step = _num_updates(built, run.folder) if last is None else last.step.step + 1
    interrupted = stop.signum is not None and step < num_steps
    found: dict[str, Any] = {"run": str(run.folder), "complete": step == num_steps, "step": step}
    if step < num_steps and not interrupted:  # [stop] has said why
        found["stopped_early"] = True
    found |= bar.figures
    if last is not None:
        found["seconds"] = time.perf_counter() - begun_at
    what_next = next_steps(built, run.folder, interrupted=interrupted, is_new=last is not None)
    return Ended(found, stop.signum if interrupted else None, what_next)


def _exit_if_interrupted(ended: Ended) -> None:
    if ended.signum is not None:
        raise typer.Exit(128 + ended.signum)


def _num_updates(built: Built, folder: Path) -> int:
    """Of the newest checkpoint."""
    found = runs.newest(folder, built.recipe).found
    return 0 if found is None else found.step


class _Stop:
    """Which signal has asked to stop, if any; a second one stops at once."""

    signum: int | None = None
    folder: Path | None = None  # of the run, once it is open

    def __init__(self, *, tells: bool) -> None:
        self._tells = tells

    def is_agreed(self, group: ProcessGroup | None) -> bool:
        """Whether any rank has been asked to; all then stop after the same update."""
        asked = distributed.largest(self.signum or 0, group)
        if asked:  # or else one that comes right now counts after the next update
            self.signum = asked
        return bool(asked)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None or self.folder is None:
            raise stop_of(signum)
        self.signum = signum
        if self._tells:
            print("\nstopping after this update; once more stops at once", file=sys.stderr)


@contextmanager
def _until_signal(built: Built, group: ProcessGroup | None) -> Iterator[_Stop]:
    """Ctrl-C and termination ask for a stop after the update at hand."""
    stop = _Stop(tells=distributed.rank_of(group) == 0)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt as interrupt:
        if stop.folder is None or not stop.folder.exists():
            raise
        command = run_command("resume", built.recipe, stop.folder)
        raise type(interrupt)(
            f"stopped at once. Continue from the last checkpoint: {command}"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Speed(ProgressColumn):
    """Examples a second over the last updates."""

    def render(self, task: Task) -> Text:
        """From when which update was seen, and how many examples were used by then."""
        seen = task.fields["seen"]
        if len(seen) < 2:
            return Text()
        (begun, before), (now, examples) = seen[0], seen[-1]
        speed = (examples - before) / (now - begun)
        return Text(f"{number(speed) if speed < 10 else format(speed, ',.0f')} examples/s")


class _Bar:
    """A line an epoch, and below it a bar where there is a terminal.

    The loss is that of the data, in the mean over the updates of the epoch so far; the penalty is
    told apart from it.
    """

    def __init__(self, built: Built, bar: Progress, quiet: bool) -> None:
        self._built = built
        self._quiet = quiet
        self._bar = bar
        self._seen: deque[tuple[float, int]] = deque(maxlen=100)
        self._task = bar.add_task("", total=None, now="", seen=self._seen)
        self._losses: list[dict[str, float]] = []  # of each update of the epoch
        self.figures: dict[str, dict[str, float]] = {}  # the last that were told, with their epoch

    def update(self, progress: runs.Progress) -> None:
        """Show one update, and at its end the epoch."""
        step, epoch = progress.step, progress.step.epoch + 1
        if self._bar.tasks[0].total is None:  # a resumed run has made some before
            self._bar.reset(self._task, total=progress.num_steps, completed=step.step)
        if self.figures.get("training", {}).get("epoch") != epoch:
            self._losses.clear()
        self._losses.append(self._built.split_loss(step.parts))
        means = {name: mean(one[name] for one in self._losses) for name in self._losses[0]}
        self.figures["training"] = {"epoch": epoch, **means}
        for part, found in progress.evaluations.items():
            self.figures[part] = {"epoch": epoch, **self._built.figures(found)}
        self._seen.append((time.perf_counter(), step.examples))
        now = f"loss {number(self._losses[-1]['loss'])}{_words(step.metrics)}"
        self._bar.update(self._task, completed=step.step + 1, now=now)
        if progress.evaluations and not self._quiet:
            self._print_epoch(epoch, progress.evaluations)

    def _print_epoch(self, epoch: int, evaluated: Iterable[str]) -> None:
        epochs = self._built.recipe.run.epochs
        line = f"epoch {epoch:>{len(str(epochs))}}/{epochs}{self._figures_of('training')}"
        for part in evaluated:
            line += f"  {part.replace('_', ' ')}:{self._figures_of(part)[1:]}"
        self._bar.console.print(wrap(line, self._bar.console.file))

    def _figures_of(self, part: str) -> str:
        return _words({k: v for k, v in self.figures[part].items() if k != "epoch"})


@contextmanager
def _bar(built: Built, quiet: bool) -> Iterator[_Bar]:
    columns = (
        BarColumn(bar_width=8),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[now]}", markup=False, table_column=Column()),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Speed(table_column=Column(no_wrap=True)),
    )
    # FORCE_COLOR makes a terminal of a log, as far as colours go; a bar has no place in it.
    hidden = quiet or not (console.is_interactive and console.file.isatty())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield _Bar(built, bar, quiet)


def _words(metrics: Mapping[str, float]) -> str:
    return "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
