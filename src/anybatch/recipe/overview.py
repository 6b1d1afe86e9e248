"""How far a run is and how good, read from its records and its recipe alone.

No code of the run is imported, no model is built, and nothing is written.
"""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from anybatch.errors import AnybatchError, RunError
from anybatch.objective import DATA
from anybatch.recipe.files import read
from anybatch.recipe.names import names_code
from anybatch.recipe.runs import check_run
from anybatch.recipe.schema import Recipe
from anybatch.training import checkpoints
from anybatch.training.disk import open_file
from anybatch.training.records import read_recipe_records, read_records

__all__ = ["describe_run", "find_runs"]

DEPTH = 3  # a comparison keeps its runs in FOLDER/RECIPE/seed-N


def find_runs(folder: Path) -> list[Path]:
    """List the runs in a folder and below it, by their last change, the newest last.

    Raises:
        RunError: no folder.
    """
    if not folder.is_dir():
        raise RunError(
            f"{folder} is no folder. Expected a folder with runs in it, such as 'anybatch train' "
            f"makes: runs."
        )
    patterns = ("/".join(["*"] * depth + ["run.json"]) for depth in range(DEPTH + 1))
    marks = {mark for pattern in patterns for mark in folder.glob(pattern) if mark.is_file()}
    return sorted((mark.parent for mark in marks), key=lambda run: (_changed(run), str(run)))


def describe_run(folder: Path) -> dict[str, Any]:
    """Describe a run: its state, how far it is, how good, and what it is made of.

    The loss is that of the data, in the mean over the updates of the last epoch; the penalty is
    told apart.

    Raises:
        RunError: no run, or files that cannot be read.
    """
    check_run(folder)
    recipe = _recipe_of(folder)
    try:
        return {"run": str(folder), **_describe(folder, recipe)}
    except AnybatchError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder / 'records.jsonl'} holds a row that is no record of a run: "
            f"{type(error).__name__}: {error}. Was the file edited, or made by another version?"
        ) from error


def _describe(folder: Path, recipe: Recipe | None) -> dict[str, Any]:
    rows = (read_records if recipe is None else read_recipe_records)(folder / "records.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    figures = {"training": _training(steps, recipe)} if steps else {}
    for row in rows:
        if row["kind"] == "evaluation":
            epoch = _epoch_of(steps, row["step"])
            losses = _split(row["parts"], recipe)
            figures[row["split"]] = {"epoch": epoch, "loss": losses["loss"], **row["metrics"]}
    saved = checkpoints.named(folder / "checkpoints")
    done = steps[-1]["epoch"] + 1 if steps else 0
    found: dict[str, Any] = {"state": _state_of(folder, rows, steps, recipe)}
    found |= {"step": steps[-1]["step"] + 1 if steps else 0, "epoch": done}
    if recipe is not None:
        found |= {"epochs": recipe.run.epochs, "model": recipe.model.name, "data": recipe.data.name}
        found |= {"batch_size": recipe.batch.size, "lr": recipe.optimizer.lr}
        found |= {"names_code": names_code(recipe)}
    found["has_ledger"] = (folder / "ledger").is_dir()
    found |= {"checkpoint": int(saved[0].name.removeprefix("step-")) if saved else None, **figures}
    return found | {"sessions": sum(row["kind"] == "session" and "torch" in row for row in rows)}


def _state_of(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    recipe: Recipe | None,
) -> str:
    if _is_open(folder):
        return "running"
    if recipe is None:
        return "made by a script"
    last = steps[-1] if steps else {"epoch": -1, "step": -1}
    if any(row["kind"] == "stop" and row["step"] == last["step"] for row in rows):
        return "stopped early"
    ended = any(row["kind"] == "evaluation" and row["step"] == last["step"] for row in rows)
    return "complete" if ended and last["epoch"] + 1 >= recipe.run.epochs else "unfinished"


def _is_open(folder: Path) -> bool:
    """Check whether a process holds the lock of a run."""
    try:
        with open_file(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _training(steps: Sequence[Mapping[str, Any]], recipe: Recipe | None) -> dict[str, Any]:
    epoch = steps[-1]["epoch"]
    losses = [_split(row["parts"], recipe) for row in steps if row["epoch"] == epoch]
    means = {name: fmean(one[name] for one in losses) for name in losses[0]}
    return {"epoch": epoch + 1, **means}


def _split(parts: Mapping[str, float | None], recipe: Recipe | None) -> dict[str, float]:
    """Split a loss by its parts into the loss of the data and the penalty."""
    known = {name: float("nan") if value is None else value for name, value in parts.items()}
    penalties = [name for name in known if recipe is not None and name not in _terms(recipe)]
    found = {"loss": sum(value for name, value in known.items() if name not in penalties)}
    return found | ({"penalty": sum(known[name] for name in penalties)} if penalties else {})


def _terms(recipe: Recipe) -> Iterator[str]:
    """List the terms of the loss that are no penalty."""
    stated = recipe.objective.reduction
    yield from [DATA] if isinstance(stated, str) or "name" in stated else stated


def _epoch_of(steps: Sequence[Mapping[str, Any]], step: int) -> int | None:
    return next((row["epoch"] + 1 for row in reversed(steps) if row["step"] == step), None)


def _recipe_of(folder: Path) -> Recipe | None:
    """Read the recipe of a run; None where a script made the run."""
    file = folder / "recipe.toml"
    return read(file) if file.is_file() else None


def _changed(run: Path) -> float:
    files = (run / "records.jsonl", run / "run.json")
    return max(file.stat().st_mtime for file in files if file.exists())
