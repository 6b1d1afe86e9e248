"""A run of a recipe: begun, continued, trained.

    recipe -> build -> begun(...) or reopened(...) -> train

Building writes nothing, so what is wrong with a recipe is found before there is a run.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

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
from anybatch.training import checkpoints
from anybatch.training.checkpoints import Checkpoint, Scan
from anybatch.training.data_fingerprint import check_data, data_of_settings, no_fingerprint
from anybatch.training.disk import check_file
from anybatch.training.records import read_records
from anybatch.training.run import Run, is_run
from anybatch.training.trackers import tracker_named

__all__ = [
    "change_run_recipe",
    "check_run",
    "compare_data",
    "create_or_reopen_run",
    "create_run",
    "describe_leftovers",
    "find_newest",
    "has_checkpoint",
    "load_recipe",
    "read_first_loss",
    "read_run_recipe",
    "reopen_run",
]

_log = logging.getLogger(__name__)


def load_recipe(name: str, changes: Sequence[str], *, allow_code: bool) -> tuple[Recipe, str, bool]:
    """A recipe to begin a run with: the recipe, its name, and whether its code may be imported.

    See `anybatch.recipe.code` for which code may be imported.

    Raises:
        RecipeError: a recipe that cannot be read, or that names code from elsewhere.
    """
    path = find_recipe(name)
    folders = (*path.absolute().parents, *path.resolve().parents)
    run = next((folder for folder in folders if is_run(folder)), None)
    name = path.parent.name if path.stem == "recipe" and path.parent.name else path.stem
    recipe = read_recipe(path, changes)
    if run is not None:
        return recipe, name, permit_code(run, recipe, allow_code=allow_code)
    check_code(path.absolute().parent, recipe, allow_code=allow_code)
    return recipe, name, True


def read_run_recipe(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        RunError: no run, or one without a recipe.
    """
    check_run(folder)
    check_file(folder / "recipe.toml")
    if not (folder / "recipe.toml").exists():
        raise RunError(
            f"{folder} has no recipe.toml. If a script made it, only that script can build its "
            f"model: run it again to continue, and call ab.evaluate there to evaluate. These work "
            f"on it: anybatch show, examples, verify. If 'anybatch train' was stopped as it made "
            f"the folder, begin again: anybatch train RECIPE --out {folder}"
        )
    return read_recipe(folder / "recipe.toml")


def check_run(folder: Path) -> None:
    """See that a folder is a run.

    Raises:
        RunError: it is none.
    """
    if not is_run(folder):
        raise RunError(
            f"{folder} is no run, expected a folder that 'anybatch train' has made, with run.json "
            f"and recipe.toml in it."
        )


def change_run_recipe(folder: Path, changes: Sequence[str]) -> Recipe:
    """The recipe of a run with some of its free keys changed; nothing is written.

    Raises:
        RunError: no run; RecipeError: a key that changes arithmetic.
    """
    return change_recipe(read_run_recipe(folder), changes)


@contextmanager
def create_run(recipe: Recipe, folder: Path, group: ProcessGroup | None = None) -> Iterator[Run]:
    """A new run of a recipe; its folder stays only if an update is made.

    Raises:
        RunError: a folder that exists.
    """
    is_first = distributed.rank_of(group) == 0
    with closing(_open_run(recipe, folder, group, is_new=True)) as run:
        try:
            yield run
        except BaseException as error:
            run.close()
            if is_first and read_first_loss(folder) is None:
                _remove_run(folder)
            elif is_first and isinstance(error, Exception):
                error.add_note(describe_leftovers(folder))
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
    """A run to be continued; free keys that have changed are recorded.

    Args:
        accept_environment, accept_data: see `Run`.

    Raises:
        RunError: another recipe than the run's, or more updates made than the recipe asks for.
    """
    accepts = {"accept_environment": accept_environment, "accept_data": accept_data}
    with closing(_open_run(setup.recipe, folder, group, **accepts)) as run:
        with distributed.by_itself(group):
            if distributed.rank_of(group) == 0:
                _check_and_record(setup, folder, run, accept_data=accept_data)
        try:
            yield run
        except Exception as error:
            run.close()
            error.add_note(describe_leftovers(folder))
            raise


def _check_and_record(setup: Setup, folder: Path, run: Run, *, accept_data: bool) -> None:
    """See that a run can go on with this recipe, which is then its own."""
    found = find_newest(folder, setup.recipe).found
    if found is not None and data_of_settings(found.settings) is not None:
        compare_data(folder, found, setup, accept=accept_data)  # before anything is written
    made, epochs = 0 if found is None else found.step, setup.recipe.run.epochs
    if made > setup.order.num_steps(epochs):
        raise RunError(
            f"{folder} has made {made} updates, more than the {setup.order.num_steps(epochs)} "
            f"of run.epochs = {epochs}: expected as many epochs or more."
        )
    if setup.recipe != read_run_recipe(folder):
        text = format_recipe(setup.recipe)
        run.replace_recipe(text)
        run.record({"kind": "session", "step": made, "recipe": text})


def compare_data(folder: Path, checkpoint: Checkpoint, setup: Setup, *, accept: bool) -> None:
    """Compare the data that were loaded with those that a checkpoint was trained on.

    Raises:
        RunError: other data, and they are not accepted.
    """
    before = data_of_settings(checkpoint.settings)
    if before is None:
        _log.warning(no_fingerprint(folder))
        return
    for difference in check_data(folder, before, setup.data_fingerprint, accept=accept):
        _log.warning("other data than the run's are accepted: %s", difference)


def find_newest(folder: Path, recipe: Recipe) -> Scan:
    """A run's newest good checkpoint, if there is one, seen to be of that recipe.

    Raises:
        RunError: a checkpoint of another recipe.
    """
    scan = checkpoints.newest(folder / "checkpoints")
    if scan.found is not None and scan.found.settings.get("recipe") != fingerprint_recipe(recipe):
        raise RunError(
            f"{folder / 'recipe.toml'} is not the recipe that {scan.found.path.name} was made "
            f"with: was it edited? Put it back, or begin a new run."
        )
    return scan


def _open_run(
    recipe: Recipe,
    folder: Path,
    group: ProcessGroup | None,
    *,
    is_new: bool = False,
    **accepts: bool,
) -> Run:
    with distributed.by_itself(group):
        names = recipe.track.to if distributed.rank_of(group) == 0 else []
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
    """The loss of a run's first update; None if none was made."""
    rows = read_records(folder / "records.jsonl")
    return next((float(row["loss"]) for row in rows if row["kind"] == "step"), None)


def _remove_run(folder: Path) -> None:
    """Take back what `create_run` has made, and only that."""
    for name in ("records.jsonl", "recipe.toml", "run.json", "lock"):  # so a run or begun, if cut
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it
        folder.rmdir()


def describe_leftovers(folder: Path) -> str:
    """Say what a run that failed has left behind."""
    found = checkpoints.newest(folder / "checkpoints").found
    if found is not None:
        return f"The checkpoint after {found.step} updates is kept in {folder}."
    return (
        f"{folder} is kept with its records, but has no checkpoint yet. Remove it, or train into "
        f"another folder."
    )


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has come as far as a checkpoint, good or damaged."""
    return any((folder / "checkpoints").glob("step-*[0-9]"))


@contextmanager
def create_or_reopen_run(setup: Setup, folder: Path, group: ProcessGroup | None) -> Iterator[Run]:
    """A run that may have been begun before, as a restart finds it; or else a new one.

    Raises:
        RunError: a run of another recipe.
    """

    def is_there() -> bool:
        if not (folder / "recipe.toml").is_file():
            return False
        if fingerprint_recipe(read_run_recipe(folder)) != fingerprint_recipe(setup.recipe):
            raise RunError(
                f"{folder} is a run of another recipe, expected one of the same, to go on with, or "
                f"none. Choose another folder by --out."
            )
        return True

    if distributed.of_first(is_there, group):
        opening = reopen_run(setup, folder, group)
    else:
        opening = create_run(setup.recipe, folder, group)
    with opening as run:
        yield run
