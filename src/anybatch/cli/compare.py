"""anybatch compare RECIPE RECIPE ..."""

import shlex
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.consent import ask_about_recipes
from anybatch.cli.options import (
    AcceptData,
    AllowCode,
    Html,
    Json,
    Set,
    check_seeds,
    complete_recipe,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from anybatch.advice.comparison import Comparison
    from anybatch.advice.side_by_side import Ended, Failed, Update
    from anybatch.advice.trial import Trial

__all__ = ["run"]

Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE...",
        help="Recipes, each a TOML file or the name of a shipped recipe.",
        autocompletion=complete_recipe,
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N,N",
        help="Compare one recipe at these batch sizes, such as 32,128.",
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        "--seeds", metavar="N", min=2, callback=check_seeds, help="Train each recipe from N seeds."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", metavar="N", min=1, help="Train N runs at a time; default: as cores allow."
    ),
]
Folder = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the runs.")]


def run(
    recipes: Recipes,
    sizes: Sizes = None,
    seeds: Seeds = 5,
    changes: Set = None,
    jobs: Jobs = None,
    out: Folder = None,
    html: Html = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Compare recipes or batch sizes by training from the same seeds.

    Runs train side by side with one thread each. Differences are taken within a seed, at equal
    numbers of examples and on the held-out data. The last lines say what the runs can tell, and
    how many more pairs would be needed. --set changes a key of all recipes.

    After Ctrl-C the same command continues where it stopped.
    """
    from anybatch.advice import entries as plan
    from anybatch.advice.plots import check_page
    from anybatch.recipe.runs import load_recipe

    plan.check_recipes(recipes, sizes, seeds)
    check_page(html)
    ask_about_recipes(recipes, allow_code=allow_code, as_json=as_json)
    loaded = [load_recipe(name, changes or [], allow_code=allow_code) for name in recipes]
    rescaled = loaded if sizes is None else plan.rescale_to_sizes(*loaded[0], sizes)
    entries = plan.make_entries(rescaled)
    folder = plan.open_folder(entries, out, accept_data=accept_data)
    trials = plan.list_trials(entries, folder, seeds, accept_data=accept_data)
    words = ["anybatch", "compare", *recipes, "--seeds", str(seeds)]
    words += [] if sizes is None else ["--batch-size", sizes]
    words += [word for change in changes or [] for word in ("--set", change)]
    words += ["--out", str(folder)]
    words += [] if html is None else ["--html", str(html)]
    words += ["--allow-code"] * allow_code + ["--accept-data"] * accept_data
    try:
        failed = _train(trials, jobs, folder, quiet=as_json)
    except KeyboardInterrupt as stop:
        message = f"stopped and saved. Continue with: {shlex.join(words)}"
        raise type(stop)(message) from None
    _print_comparison(trials, failed, folder, html, as_json=as_json)


def _train(
    trials: "Sequence[Trial]", jobs: int | None, folder: Path, *, quiet: bool
) -> "list[Failed]":
    """Train the runs that have not ended, and show their progress. Return those that failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    from anybatch.advice.side_by_side import Failed, count_jobs, train_side_by_side
    from anybatch.advice.trial import read_outcome
    from anybatch.cli.mistakes import describe_error
    from anybatch.cli.render import console, make_progress

    rest = [trial for trial in trials if read_outcome(trial.folder) is None]
    if len(rest) < len(trials) and not quiet:
        num_done = len(trials) - len(rest)
        console.print(f"{num_done} of {len(trials)} runs are done already, in {folder}")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}", markup=False),
    )
    failed = []
    events = train_side_by_side(rest, jobs or count_jobs(trials), describe_error)
    with closing(events), make_progress(console, *columns, quiet=quiet) as progress:
        bars = _Bars(progress, quiet)
        for event in events:
            bars.update(event)
            if isinstance(event, Failed):
                failed.append(event)
    return failed


class _Bars:
    """A bar for each run in training, and a line for each that has ended."""

    def __init__(self, progress: "Progress", quiet: bool) -> None:
        self._progress, self._quiet = progress, quiet
        self._tasks: dict[Path, TaskID] = {}

    def update(self, event: "Update | Ended | Failed") -> None:
        """Show one event."""
        from anybatch.advice.side_by_side import Ended, Update
        from anybatch.displays import format_number

        name, folder = _name_trial(event.trial), event.trial.folder
        if isinstance(event, Update):
            if folder not in self._tasks:
                self._tasks[folder] = self._progress.add_task(name, now="", total=None)
            self._progress.update(
                self._tasks[folder],
                completed=event.steps,
                total=event.num_steps,
                now=f"loss {format_number(event.loss)}",
            )
            return
        if folder in self._tasks:
            self._progress.remove_task(self._tasks.pop(folder))
        if self._quiet:
            return
        text = "failed"
        if isinstance(event, Ended):
            values = event.outcome.held_out.items()
            held_out = "  ".join(f"{figure} {value:.4f}" for figure, value in values)
            text = f"{event.outcome.steps} updates   held out: {held_out}"
        self._progress.console.print(f"{name}   {text}")


def _name_trial(trial: "Trial") -> str:
    return f"{trial.name} seed {trial.seed}"


def _print_comparison(
    trials: "Sequence[Trial]",
    failed: "Sequence[Failed]",
    folder: Path,
    html: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print the results, and write the page. Exit with code 2 if a run has failed."""
    from anybatch.advice.comparison import compare_trials
    from anybatch.advice.entries import list_accepted_data
    from anybatch.cli.output import print_error
    from anybatch.cli.render import print_result

    comparison = compare_trials(trials)
    failures = [f"{_name_trial(one.trial)} failed: {one.message}" for one in failed]
    accepted = list_accepted_data(folder)
    notes = [f"Other data were accepted since the first runs: {one}." for one in accepted]
    if comparison is not None and html is not None:
        _write_comparison(html, comparison, [*notes, *failures])
    if as_json:
        runs = [str(trial.folder) for trial in trials]
        results = {} if comparison is None else comparison.as_json()
        result = {"folder": str(folder), "runs": runs, "failed": failures, **results}
        result |= {"accepted": {"data": accepted}} if accepted else {}
        print_result(result, as_json=True)
    elif comparison is not None:
        _print_results(comparison, folder, notes)
    for failure in failures:
        print_error(failure)
    if failures:
        raise typer.Exit(2)


def _write_comparison(file: Path, comparison: "Comparison", notes: Sequence[str]) -> None:
    from anybatch.advice.comparison import list_verdicts
    from anybatch.advice.plots import write_page

    write_page(
        file,
        " against ".join(comparison.names),
        [*comparison.explain_figures(), *notes],
        comparison.make_plots(),
        comparison.make_table(),
        verdicts=list_verdicts(comparison),
        command="compare",
    )


def _print_results(comparison: "Comparison", folder: Path, notes: Sequence[str]) -> None:
    from anybatch.advice.comparison import list_verdicts
    from anybatch.cli.render import console, print_chart, print_table, print_wrapped

    grid = comparison.grid
    console.print(f"\n{comparison.title}\n")
    print_chart(comparison.make_bands(), (f"{grid[0]:,.0f} examples", f"{grid[-1]:,.0f}"))
    print_table(comparison.make_table(), list_if_wide=True)
    print_wrapped(*comparison.explain_figures(), *notes, f"The runs are in {folder}", "")
    print_wrapped(*list_verdicts(comparison))
