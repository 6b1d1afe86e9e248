"""anybatch train RECIPE"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.consent import ask_about_recipes
from anybatch.cli.options import AllowCode, Json, Patience, Ranks, RecipeName, Set, check_seeds

if TYPE_CHECKING:
    from anybatch.distributed import ProcessGroup

__all__ = ["run"]


def run(
    recipe: RecipeName,
    changes: Set = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="The new run; default: runs/RECIPE-N."),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            metavar="N",
            min=1,
            callback=check_seeds,
            help="Train from N seeds, and print mean and spread.",
        ),
    ] = 1,
    ranks: Ranks = None,
    patience: Patience = 600,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe.

    Ctrl-C finishes the update, saves it and says how to continue. A second Ctrl-C stops at once.

    With --ranks N, or under torchrun, N processes share each batch, with the same result. Under
    torchrun a run that is in --out already is continued, as a restart needs it.
    """
    from anybatch.cli.ranks import call_on_ranks, is_under_torchrun
    from anybatch.recipe.runs import load_recipe

    ask_about_recipes([recipe], allow_code=allow_code, as_json=as_json)
    if not is_under_torchrun():  # refuse a wrong recipe before there are ranks
        load_recipe(recipe, changes or [], allow_code=allow_code)
    options = (changes or [], out, seeds, allow_code, as_json)
    call_on_ranks(partial(_train, recipe, *options), ranks, patience)


def _train(
    name: str,
    changes: Sequence[str],
    out: Path | None,
    seeds: int,
    allow_code: bool,
    as_json: bool,
    group: "ProcessGroup | None",
) -> None:
    """Train on one of the ranks, or on the only one."""
    from anybatch.cli.ranks import is_under_torchrun, select_device
    from anybatch.cli.session import choose_folder, train_and_report, train_seeds
    from anybatch.distributed import broadcast_from_first, call_together
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import create_or_reopen_run, create_run, has_checkpoint, load_recipe

    recipe, stem, allow_code = call_together(
        lambda: load_recipe(name, changes, allow_code=allow_code), group
    )
    folder = broadcast_from_first(lambda: _check_restart(out, seeds) or choose_folder(stem), group)
    select_device(recipe.run.device, group)
    if seeds > 1:
        train_seeds(recipe, folder, seeds, allow_code=allow_code, as_json=as_json, group=group)
        return
    may_restart = is_under_torchrun()
    is_fresh = not (may_restart and broadcast_from_first(lambda: has_checkpoint(folder), group))
    setup = call_together(lambda: build(recipe, allow_code=allow_code, fresh=is_fresh), group)
    if may_restart:
        opening = create_or_reopen_run(setup, folder, group)
    else:
        opening = create_run(recipe, folder, group)
    train_and_report(setup, opening, as_json=as_json, group=group)


def _check_restart(out: Path | None, seeds: int) -> Path | None:
    """Return --out. A restart by torchrun needs it to find the run."""
    from anybatch.errors import RunError

    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and (out is None or seeds > 1):
        raise RunError(
            "torchrun --max-restarts needs --out FOLDER and one seed: a restart has to find the "
            "run that it continues."
        )
    return out
