"""anybatch compare RECIPE RECIPE ..."""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AllowCode, Json, Set

__all__ = ["run"]


def run(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Two or more: files, or shipped ones.")
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=2, max=1000, help="Pairs of runs.")] = 5,
    changes: Set = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; default: as cores allow.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots.")] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Compare recipes: training loss at equal numbers of examples, and held-out figures.

    Each recipe is trained from each seed, side by side with one thread each, and differences are
    taken within a seed; --set changes a key of all recipes. The same command goes on with what was
    cut off. Stopped by Ctrl-C it saves, says how to continue, and ends with exit code 130.
    """
    from anybatch.advice.comparison import entries_of, open_folder, trials_of
    from anybatch.advice.pages import check_page
    from anybatch.cli.comparing import Call, conclude, make_runs
    from anybatch.errors import RecipeError
    from anybatch.recipe.runs import read_recipe

    if len(recipes) < 2:
        raise RecipeError(
            f"expected two recipes or more to compare, got {recipes[0]} alone. For its seeds by "
            f"themselves: anybatch train {recipes[0]} --seeds {seeds}"
        )
    check_page(html)
    entries = entries_of(
        read_recipe(name, changes or [], allow_code=allow_code) for name in recipes
    )
    call = Call(
        recipes=recipes,
        seeds=seeds,
        changes=changes or [],
        folder=open_folder(entries, out),
        html=html,
        allow_code=allow_code,
    )
    trials = trials_of(entries, call.folder, seeds)
    failed = make_runs(trials, jobs, call, quiet=as_json)
    conclude(trials, failed, call, as_json=as_json)
