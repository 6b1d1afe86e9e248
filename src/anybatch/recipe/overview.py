"""Describe runs by their records and their recipe: how far they are, and how good.

No code of the run is imported, no model is built, and nothing is written.
"""

import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from anybatch.errors import AnybatchError, RunError
from anybatch.objective import DATA
from anybatch.recipe.code import has_code
from anybatch.recipe.files import read_recipe
from anybatch.recipe.runs import check_run
from anybatch.recipe.schema import Recipe
from anybatch.runs import checkpoints
from anybatch.runs.disk import open_file
from anybatch.runs.records import read_recipe_records, read_records

__all__ = ["describe_run", "find_runs"]

DEPTH = 3  # a comparison has its runs in FOLDER/RECIPE/seed-N

Rows = Sequence[Mapping[str, Any]]


def find_runs(folder: Path) -> list[Path]:
    """List the runs in a folder and below it, the last changed last."""
    if not folder.is_dir():
        raise RunError(
            f"{folder} is no folder. Expected a folder with runs in it, such as 'anybatch train' "
            f"makes: runs."
        )
    patterns = ("/".join(["*"] * depth + ["run.json"]) for depth in range(DEPTH + 1))
    marks = {mark for pattern in patterns for mark in folder.glob(pattern) if mark.is_file()}
    return sorted((mark.parent for mark in marks), key=lambda run: (_get_time(run), str(run)))


def describe_run(folder: Path) -> dict[str, Any]:
    """Describe a run: its state, how far it is, how good, and what it is made of.

    The training loss is that of the data: a mean over the updates of the last epoch. The penalty
    is a figure of its own.

    Raises:
        RunError: the folder is no run, or has files that cannot be read.
    """
    check_run(folder)
    file = folder / "recipe.toml"
    try:
        recipe = read_recipe(file) if file.is_file() else None
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
    figures = {"training": _average_training(steps, recipe)} if steps else {}
    for row in rows:
        if row["kind"] == "evaluation":
            epochs = (one["epoch"] + 1 for one in reversed(steps) if one["step"] == row["step"])
            losses = _split_loss(row["parts"], recipe, row.get("num_examples"))
            losses.pop("penalty", None)
            figures[row["split"]] = {"epoch": next(epochs, None), **losses, **row["metrics"]}
    paths = checkpoints.list_paths(folder / "checkpoints")
    result: dict[str, Any] = {"state": _describe_state(folder, rows, steps, recipe)}
    result["step"] = steps[-1]["step"] + 1 if steps else 0
    result["epoch"] = steps[-1]["epoch"] + 1 if steps else 0
    if recipe is not None:
        result |= {
            "epochs": recipe.run.epochs,
            "model": recipe.model.name,
            "data": recipe.data.name,
            "batch_size": recipe.batch.size,
            "lr": recipe.optimizer.lr,
            "names_code": has_code(recipe),
        }
    result["has_ledger"] = (folder / "ledger").is_dir()
    result["checkpoint"] = int(paths[0].name.removeprefix("step-")) if paths else None
    if spikes := [row["step"] for row in rows if row["kind"] == "spike"]:
        result |= {"spikes": len(spikes), "newest_spike": spikes[-1]}
    num_sessions = sum(row["kind"] == "session" and "torch" in row for row in rows)
    return {**result, **figures, "sessions": num_sessions}


def _describe_state(folder: Path, rows: Rows, steps: Rows, recipe: Recipe | None) -> str:
    if _is_open(folder):
        return "running"
    if recipe is None:
        return "made by a script"
    last = steps[-1] if steps else {"epoch": -1, "step": -1}
    if any(row["kind"] == "stop" and row["step"] == last["step"] for row in rows):
        return "stopped early"
    has_end = any(row["kind"] == "evaluation" and row["step"] == last["step"] for row in rows)
    return "complete" if has_end and last["epoch"] + 1 >= recipe.run.epochs else "unfinished"


def _is_open(folder: Path) -> bool:
    """Return whether a process holds the lock of a run."""
    try:
        with open_file(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _average_training(steps: Rows, recipe: Recipe | None) -> dict[str, Any]:
    """Average loss and penalty over the updates of the last epoch."""
    epoch = steps[-1]["epoch"]
    before = [0, *(row["examples"] for row in steps)]
    losses = [
        _split_loss(row["parts"], recipe, row["examples"] - last)
        for row, last in zip(steps, before, strict=False)
        if row["epoch"] == epoch
    ]
    return {"epoch": epoch + 1} | {name: fmean(one[name] for one in losses) for name in losses[0]}


def _split_loss(
    parts: Mapping[str, float | None], recipe: Recipe | None, num_examples: int | None
) -> dict[str, float]:
    """Split the parts of a loss into the loss of the data and the penalty.

    Under Sum the loss per example is added; see `Setup.split_loss`.
    """
    values = {name: float("nan") if value is None else value for name, value in parts.items()}
    terms = values.keys() if recipe is None else _list_terms(recipe)
    losses = {"loss": sum(value for name, value in values.items() if name in terms)}
    if num_examples and recipe is not None and recipe.objective.reduction == "sum":
        losses["loss_per_example"] = losses["loss"] / num_examples
    penalties = [value for name, value in values.items() if name not in terms]
    return losses | ({"penalty": sum(penalties)} if penalties else {})


def _list_terms(recipe: Recipe) -> set[str]:
    """List the parts of the loss that are no penalty."""
    reduction = recipe.objective.reduction
    return {DATA} if isinstance(reduction, str) or "name" in reduction else set(reduction)


def _get_time(run: Path) -> float:
    """Return when a run changed last."""
    files = (run / "records.jsonl", run / "run.json")
    return max(file.stat().st_mtime for file in files if file.exists())
