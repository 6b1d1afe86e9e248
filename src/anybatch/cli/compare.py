"""anybatch compare RECIPE RECIPE ..."""

from pathlib import Path
from typing import Annotated

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
    from anybatch.advice.comparison import (
        at_sizes,
        check_recipes,
        entries_of,
        open_folder,
        trials_of,
    )
    from anybatch.advice.pages import check_page
    from anybatch.cli.comparing import Call, conclude, make_runs
    from anybatch.recipe.runs import read_recipe

    check_recipes(recipes, sizes, seeds)
    check_page(html)
    ask_about_recipes(recipes, allow_code=allow_code, as_json=as_json)
    read = [read_recipe(name, changes or [], allow_code=allow_code) for name in recipes]
    entries = entries_of(read if sizes is None else at_sizes(*read[0], sizes))
    call = Call(
        recipes=recipes,
        sizes=sizes,
        seeds=seeds,
        changes=changes or [],
        folder=open_folder(entries, out, accept_data=accept_data),
        html=html,
        allow_code=allow_code,
        accept_data=accept_data,
    )
    trials = trials_of(entries, call.folder, seeds, accept_data=accept_data)
    failed = make_runs(trials, jobs, call, quiet=as_json)
    conclude(trials, failed, call, as_json=as_json)
