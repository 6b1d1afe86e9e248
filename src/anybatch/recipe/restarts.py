"""Runs that are started again, by the same command or another.

A restart finds a run as it was left: before its first checkpoint, or after the newest that
verifies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import RunError
from anybatch.recipe.build import Built
from anybatch.recipe.files import fingerprint
from anybatch.recipe.runs import begun, recipe_of, reopened
from anybatch.runs.run import Run

__all__ = ["has_checkpoint", "taken_up"]


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has come as far as a checkpoint, good or damaged."""
    return any((folder / "checkpoints").glob("step-*[0-9]"))


@contextmanager
def taken_up(built: Built, folder: Path, group: ProcessGroup | None) -> Iterator[Run]:
    """A run that may have been begun before, as a restart finds it; or else a new one.

    Raises:
        RunError: a run of another recipe.
    """

    def is_there() -> bool:
        if not (folder / "recipe.toml").is_file():
            return False
        if fingerprint(recipe_of(folder)) != fingerprint(built.recipe):
            raise RunError(
                f"{folder} is a run of another recipe, expected one of the same, to go on with, or "
                f"none. Choose another folder by --out."
            )
        return True

    if distributed.of_first(is_there, group):
        opening = reopened(built, folder, group)
    else:
        opening = begun(built.recipe, folder, group)
    with opening as run:
        yield run
