"""Folders of runs: make one for a recipe, open it again, and read its recipe.

    recipe -> build -> create_run(...) or reopen_run(...) -> train

Building writes nothing, so mistakes in a recipe are found before there is a folder.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import RunError
from anybatch.recipe.build import Setup
from anybatch.recipe.code import check_code, permit_code
from anybatch.recipe.files import (
    change_recipe,
    find_recipe,
    fingerprint_recipe,
    format_recipe,
    read_recipe,
)
from anybatch.recipe.schema import Recipe
from anybatch.runs import checkpoints
from anybatch.runs.checkpoints import Checkpoint, Scan
from anybatch.runs.data_fingerprint import check_data, describe_missing_fingerprint, get_fingerprint
from anybatch.runs.disk import check_file
from anybatch.runs.records import read_recipe_records
from anybatch.runs.run import Run, is_run
from anybatch.runs.trackers import tracker_named

__all__ = [
    "change_run_recipe",
    "check_recipe",
    "check_run",
    "compare_data",
    "create_or_reopen_run",
    "create_run",
    "find_newest",
    "has_checkpoint",
    "load_recipe",
    "read_first_loss",
    "read_run_recipe",
    "reopen_run",
]

_log = logging.getLogger(__name__)


def load_recipe(name: str, changes: Sequence[str], *, allow_code: bool) -> tuple[Recipe, str, bool]:
    """Read the recipe of a new run, and decide whether its code may be imported.

    Args:
        name: a path, or the name of a shipped recipe.
        changes: `section.key=value`.
        allow_code: whether the user said --allow-code; see `anybatch.recipe.code`.

    Returns:
        The recipe, a name for its runs, and whether its code may be imported.

    Raises:
        RecipeError: the recipe cannot be read, or names code that may not be imported.
    """
    path = find_recipe(name)
    folders = (*path.absolute().parents, *path.resolve().parents)
    run = next((folder for folder in folders if is_run(folder)), None)
    name = path.parent.name if path.stem == "recipe" and path.parent.name else path.stem
    recipe = read_recipe(path, changes)
    if run is not None:
        return recipe, name, permit_code(run, recipe, allow_code=allow_code, warn_of_changes=False)
    check_code(path.absolute().parent, recipe, allow_code=allow_code)
    return recipe, name, True


def read_run_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
        RunError: the folder is no run, or has no recipe.
    """
    check_run(folder)
    check_file(folder / "recipe.toml")
    if not (folder / "recipe.toml").exists():
        raise RunError(
            f"{folder} has no recipe.toml. If a script made it, only that script can build its "
            f"model: run it again to continue, and call ab.evaluate there to evaluate. These work "
            f"on it: anybatch show, examples, verify. If 'anybatch train' was stopped as it made "
            f"the folder, start again: anybatch train RECIPE --out {folder}"
        )
    return read_recipe(folder / "recipe.toml")


def check_run(folder: Path) -> None:
    """Check that a folder is a run."""
    if not is_run(folder):
        raise RunError(
            f"{folder} is no run. Expected a folder that 'anybatch train' has made, with run.json "
            f"and recipe.toml in it."
        )


def change_run_recipe(folder: Path, changes: Sequence[str]) -> Recipe:
    """Read the recipe of a run and change some of its free keys. Nothing is written.

    Raises:
        RunError: the folder is no run; RecipeError: a key changes arithmetic.
    """
    return change_recipe(read_run_recipe(folder), changes)


@contextmanager
def create_run(recipe: Recipe, folder: Path, group: ProcessGroup | None = None) -> Iterator[Run]:
    """Make a new run, and close it in the end. Remove its folder if no update was made."""
    is_first = distributed.get_rank(group) == 0
    with closing(_open_run(recipe, folder, group, is_new=True)) as run:
        try:
            yield run
        except BaseException as error:
            run.close()
            is_empty = is_first and read_first_loss(folder) is None
            is_removed = is_empty and _remove_run(folder)
            if is_first and not is_removed and isinstance(error, Exception):
                error.add_note(_describe_leftovers(folder))
            raise


@contextmanager
def reopen_run(
    setup: Setup,
    folder: Path,
    group: ProcessGroup | None = None,
    *,
    accept_environment: bool = False,
    accept_data: bool = False,
) -> Iterator[Run]:
    """Open a run to continue it, and record the free keys that have changed.

    Args:
        accept_environment, accept_data: see `Run`.

    Raises:
        RunError: the run has another recipe, or more updates than the recipe asks for.
    """
    accepts = {"accept_environment": accept_environment, "accept_data": accept_data}
    with closing(_open_run(setup.recipe, folder, group, **accepts)) as run:
        check = partial(_check_and_record, setup, folder, run, accept_data=accept_data)
        before = distributed.broadcast_from_first(check, group)
        for group_now, fused in zip(setup.optimizer.param_groups, before, strict=False):
            if "fused" in group_now and fused in (True, False, None):
                group_now["fused"] = fused  # for the bits that the run began with
        try:
            yield run
        except Exception as error:
            run.close()
            error.add_note(_describe_leftovers(folder))
            raise


def _check_and_record(setup: Setup, folder: Path, run: Run, *, accept_data: bool) -> list[Any]:
    """Check that a run can continue with this recipe, and make it the run's own.

    Returns:
        Whether each group of the optimiser was fused when the run began.
    """
    checkpoint = find_newest(folder, setup.recipe).checkpoint
    if checkpoint is not None and get_fingerprint(checkpoint.settings) is not None:
        compare_data(folder, checkpoint, setup, accept=accept_data)  # before anything is written
    step, epochs = 0 if checkpoint is None else checkpoint.step, setup.recipe.run.epochs
    num_steps = setup.order.num_steps(epochs)
    if step > num_steps:
        raise RunError(
            f"{folder} has made {step} updates, more than the {num_steps} of run.epochs = "
            f"{epochs}. Set run.epochs to as many epochs or more."
        )
    if setup.recipe != read_run_recipe(folder):
        text = format_recipe(setup.recipe)
        run.replace_recipe(text)
        run.record({"kind": "session", "step": step, "recipe": text})
    return [] if checkpoint is None else _list_fused(checkpoint.settings)


def _list_fused(settings: Mapping[str, Any]) -> list[Any]:
    """List `fused` of each group; none if a stranger's settings have another form."""
    optimizer = settings.get("optimizer")
    groups = optimizer.get("groups") if isinstance(optimizer, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return []
    return [group.get("fused") for group in groups]


def compare_data(folder: Path, checkpoint: Checkpoint, setup: Setup, *, accept: bool) -> None:
    """Compare the loaded data with those of a checkpoint.

    Raises:
        RunError: other data, and they are not accepted.
    """
    fingerprint = get_fingerprint(checkpoint.settings)
    if fingerprint is None:
        _log.warning(describe_missing_fingerprint(folder))
        return
    for difference in check_data(folder, fingerprint, setup.data_fingerprint, accept=accept):
        _log.warning("other data than the run's are accepted: %s", difference)


def find_newest(folder: Path, recipe: Recipe) -> Scan:
    """Find the newest good checkpoint of a run, and check that it is of this recipe."""
    scan = checkpoints.find_newest(folder / "checkpoints")
    if scan.checkpoint is not None:
        check_recipe(folder, recipe, scan.checkpoint)
    return scan


def check_recipe(folder: Path, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint of a run was made with its recipe."""
    if checkpoint.settings.get("recipe") != fingerprint_recipe(recipe):
        raise RunError(
            f"{folder / 'recipe.toml'} is not the recipe that {checkpoint.path.name} was made "
            f"with. Was it edited? Put it back, or start a new run."
        )


def _open_run(
    recipe: Recipe,
    folder: Path,
    group: ProcessGroup | None,
    *,
    is_new: bool = False,
    **accepts: bool,
) -> Run:
    with distributed.raise_together(group):
        names = recipe.track.to if distributed.get_rank(group) == 0 else []
        trackers = [tracker_named(name) for name in names]
    return Run(
        folder,
        checkpoint_every=recipe.run.checkpoint_every,
        keep=recipe.run.keep,
        trackers=trackers,
        smoothing=recipe.track.smoothing,
        settings={"recipe": fingerprint_recipe(recipe)},
        group=group,
        recipe=format_recipe(recipe) if is_new else None,
        **accepts,
    )


def read_first_loss(folder: Path) -> float | None:
    """Read the loss of a run's first update, nan if not finite; None if there was no update."""
    rows = read_recipe_records(folder / "records.jsonl")
    losses = (row["loss"] for row in rows if row["kind"] == "step")
    return next((math.nan if loss is None else float(loss) for loss in losses), None)


def _remove_run(folder: Path) -> bool:
    """Remove what `create_run` has made, unless other files are there. Return whether it did."""
    # In this order, so that a folder is a run for as long as it has a recipe.
    names = ("records.jsonl", "recipe.toml", "run.json", "lock")
    if not {path.name.removesuffix(".partial") for path in folder.iterdir()} <= {*names}:
        return False  # of a tracker, for instance; without run.json the folder would be no run
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return True


def _describe_leftovers(folder: Path) -> str:
    """Say what a failed run has left in its folder."""
    checkpoint = checkpoints.find_newest(folder / "checkpoints").checkpoint
    if checkpoint is not None:
        return f"The checkpoint after {checkpoint.step} updates is kept in {folder}."
    return (
        f"{folder} is kept with its records, but has no checkpoint yet. Remove it, or train into "
        f"another folder."
    )


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has a checkpoint, good or damaged."""
    return any((folder / "checkpoints").glob("step-*[0-9]"))


def create_or_reopen_run(
    setup: Setup, folder: Path, group: ProcessGroup | None
) -> AbstractContextManager[Run]:
    """Open the run in a folder if there is one, as a restart by torchrun needs it; else make one.

    Raises:
        RunError: the folder is a run of another recipe.
    """

    def is_run_of_recipe() -> bool:
        if not (folder / "recipe.toml").is_file():
            return False
        if fingerprint_recipe(read_run_recipe(folder)) != fingerprint_recipe(setup.recipe):
            raise RunError(
                f"{folder} is a run of another recipe. Expected a run of this recipe, or no such "
                f"folder. Choose another folder by --out."
            )
        return True

    if distributed.broadcast_from_first(is_run_of_recipe, group):
        return reopen_run(setup, folder, group)
    return create_run(setup.recipe, folder, group)
