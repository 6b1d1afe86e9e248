"""A comparison in the terminal: runs that are going, what they tell, and what to do next."""

import os
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from anybatch.advice.compared import Compared, compared
from anybatch.advice.comparison import accepted_data
from anybatch.advice.pages import Plot, write_page
from anybatch.advice.plots import chart
from anybatch.advice.side_by_side import Ended, Failed, Going, side_by_side
from anybatch.advice.trial import Trial, outcome_of
from anybatch.advice.verdict import verdicts
from anybatch.cli.mistakes import explain
from anybatch.cli.output import tell
from anybatch.cli.render import console, number, show, show_rows
from anybatch.cli.wrapping import wrap
from anybatch.limits import max_processes

__all__ = ["Call", "conclude", "make_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What was asked for."""

    recipes: Sequence[str]
    sizes: str | None
    seeds: int
    changes: Sequence[str]
    folder: Path
    html: Path | None
    allow_code: bool
    accept_data: bool

    @property
    def command(self) -> str:
        """What goes on with it, as one types it."""
        words = ["anybatch", "compare", *self.recipes, "--seeds", str(self.seeds)]
        words += [] if self.sizes is None else ["--batch-size", self.sizes]
        words += [word for change in self.changes for word in ("--set", change)]
        words += ["--out", str(self.folder)]
        words += [] if self.html is None else ["--html", str(self.html)]
        words += ["--allow-code"] if self.allow_code else []
        words += ["--accept-data"] if self.accept_data else []
        return shlex.join(words)


def make_runs(
    trials: Sequence[Trial], jobs: int | None, call: Call, *, quiet: bool
) -> list[Failed]:
    """Make the runs that are not done, and show how far they are; those that failed."""
    left = [trial for trial in trials if outcome_of(trial.folder) is None]
    if len(left) < len(trials) and not quiet:
        done = len(trials) - len(left)
        console.print(f"{done} of {len(trials)} runs are done already, in {call.folder}")
    failed = []
    try:
        events = side_by_side(left, min(jobs or _as_cores_allow(trials), max_processes()), explain)
        with closing(events), _bars(quiet) as bars:
            shown = _Shown(bars, quiet)
            for event in events:
                shown.take_in(event)
                if isinstance(event, Failed):
                    failed.append(event)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"stopped and saved. Continue with: {call.command}") from None
    return failed


def conclude(
    trials: Sequence[Trial], failed: Sequence[Failed], call: Call, *, as_json: bool
) -> None:
    """Print what the runs tell, and write the page; ends with exit code 2 if one has failed."""
    found = compared(trials)
    failures = [f"{_place(one.trial)} failed: {one.message}" for one in failed]
    accepted = accepted_data(call.folder)
    notes = [
        f"Other data were accepted: {difference}. Runs that were made before have the other data."
        for difference in accepted
    ]
    if found is not None and call.html is not None:
        _write_page(call.html, found, [*notes, *failures])
    if as_json:
        runs = [str(trial.folder) for trial in trials]
        told = {} if found is None else {**found.as_json(), "verdicts": verdicts(found)}
        told |= {"accepted": {"data": accepted}} if accepted else {}
        show({"folder": str(call.folder), "runs": runs, "failed": failures, **told}, as_json=True)
    elif found is not None:
        _print(found, call.folder, notes)
    for failure in failures:
        tell(failure)
    if failures:
        raise typer.Exit(2)


def _as_cores_allow(trials: Sequence[Trial]) -> int:
    """As many runs as have threads, and one at a time on an accelerator."""
    if any(trial.recipe.run.device != "cpu" for trial in trials):
        return 1
    threads = max(trial.recipe.run.threads or 1 for trial in trials)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((cores or 1) // threads, 1)


def _bars(quiet: bool) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}", markup=False),
    )
    hidden = quiet or not (console.is_interactive and console.file.isatty())
    return Progress(*columns, console=console, transient=True, disable=hidden)


class _Shown:
    """A bar for each run that is going, and a line for each that has ended."""

    def __init__(self, bars: Progress, quiet: bool) -> None:
        self._bars, self._quiet = bars, quiet
        self._tasks: dict[Path, TaskID] = {}

    def take_in(self, event: Going | Ended | Failed) -> None:
        trial = event.trial
        if isinstance(event, Going):
            if trial.folder not in self._tasks:
                self._tasks[trial.folder] = self._bars.add_task(_place(trial), now="", total=None)
            self._bars.update(
                self._tasks[trial.folder],
                completed=event.steps,
                total=event.num_steps,
                now=f"loss {number(event.loss)}",
            )
            return
        if trial.folder in self._tasks:
            self._bars.remove_task(self._tasks.pop(trial.folder))
        if not self._quiet:
            self._bars.console.print(f"{_place(trial)}   {_how(event)}")


def _how(event: Ended | Failed) -> str:
    if isinstance(event, Failed):
        return "failed"
    held_out = "  ".join(f"{name} {value:.4f}" for name, value in event.outcome.held_out.items())
    return f"{event.outcome.steps} updates   held out: {held_out}"


def _place(trial: Trial) -> str:
    return f"{trial.name} seed {trial.seed}"


def _print(found: Compared, folder: Path, notes: Sequence[str]) -> None:
    lines = {name: band.middle for name, band in found.bands().items()}
    console.print(f"\n{_title(found)}\n")
    for row in chart(lines, (f"{found.grid[0]:,.0f} examples", f"{found.grid[-1]:,.0f}")):
        console.print(row)
    console.print()
    show_rows(found.rows())
    for text in (*found.texts(), *notes, f"The runs are in {folder}", "", *verdicts(found)):
        console.print(wrap(text, console.file))


def _title(found: Compared) -> str:
    return f"Training loss of the last {found.window:,} examples, mean over seeds"


def _write_page(file: Path, found: Compared, notes: Sequence[str]) -> None:
    grid = found.grid.tolist()
    title, bands = f"{_title(found)}, ± standard deviation", found.bands()
    plots = [Plot(title=title, x=grid, x_name="examples", y_name="loss", bands=bands)]
    if bands := found.difference_bands():
        title = "Mean difference within a seed, with its 95 % interval at each place"
        plots.append(Plot(title=title, x=grid, x_name="examples", y_name="loss", bands=bands))
    title = " against ".join(found.names)
    texts = [*found.texts(), *notes]
    write_page(file, title, texts, plots, found.rows(), verdicts=verdicts(found), command="compare")
