"""anybatch resume RUN"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.consent import ask_about_code
from anybatch.cli.options import AcceptData, AllowCode, Json, Patience, Ranks, RunFolder, Set

if TYPE_CHECKING:
    from anybatch.distributed import ProcessGroup

__all__ = ["run"]

AcceptEnvironment = Annotated[
    bool,
    typer.Option(
        "--accept-environment",
        help="Continue a bitwise run although the environment changed, and record that.",
    ),
]


def run(
    folder: RunFolder,
    changes: Set = None,
    ranks: Ranks = None,
    patience: Patience = 600,
    allow_code: AllowCode = False,
    accept_environment: AcceptEnvironment = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Continue a run from its newest good checkpoint.

    --set accepts only keys that do not change the arithmetic, such as run.epochs. The number of
    ranks may differ from before. After Ctrl-C the training is saved, and the last line says how to
    continue.
    """
    from anybatch.cli.ranks import call_on_ranks, is_under_torchrun
    from anybatch.recipe.runs import change_run_recipe

    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    if not is_under_torchrun():  # refuse wrong changes before there are ranks
        change_run_recipe(folder, changes or [])
    options = (changes or [], allow_code, accept_environment, accept_data, as_json)
    call_on_ranks(partial(_resume, folder, *options), ranks, patience)


def _resume(
    folder: Path,
    changes: Sequence[str],
    allow_code: bool,
    accept_environment: bool,
    accept_data: bool,
    as_json: bool,
    group: "ProcessGroup | None",
) -> None:
    """Continue on one of the ranks, or on the only one."""
    from anybatch.cli.ranks import select_device
    from anybatch.cli.session import train_and_report
    from anybatch.distributed import broadcast_from_first, call_together
    from anybatch.recipe.build import build
    from anybatch.recipe.code import permit_code
    from anybatch.recipe.runs import change_run_recipe, has_checkpoint, reopen_run

    recipe = call_together(lambda: change_run_recipe(folder, changes), group)
    select_device(recipe.run.device, group)
    is_fresh = not broadcast_from_first(lambda: has_checkpoint(folder), group)
    allow_code = permit_code(folder, recipe, allow_code=allow_code)
    setup = call_together(lambda: build(recipe, allow_code=allow_code, fresh=is_fresh), group)
    accepts = {"accept_environment": accept_environment, "accept_data": accept_data}
    train_and_report(
        setup, reopen_run(setup, folder, group, **accepts), as_json=as_json, group=group
    )
