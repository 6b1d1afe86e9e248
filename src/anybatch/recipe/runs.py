"""What one does with a recipe and the runs made of it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.errors import CheckpointError, DivergenceError, RunError
from anybatch.recipe.build import Built, build
from anybatch.recipe.files import find, fingerprint, read, text_of, with_changes
from anybatch.recipe.schema import Recipe
from anybatch.training import checkpoints
from anybatch.training.checkpoints import Checkpoint
from anybatch.training.evaluation import Evaluation, evaluate, outputs
from anybatch.training.run import Run, is_run, read_records
from anybatch.training.state import TrainingState
from anybatch.training.steps import Step, steps

__all__ = [
    "Progress",
    "begin",
    "evaluation_of",
    "export",
    "predictions",
    "read_recipe",
    "reopen",
    "restored",
    "train",
    "verify",
    "write_new",
]

DIVERGED = 1000.0
"""A loss this many times the first (or 1, whichever is more) is no training any more."""


@dataclass(frozen=True)
class Progress:
    """One update, and at the end of an epoch what the model is worth on the held-out data."""

    step: Step
    num_steps: int
    held_out: Evaluation | None


def read_recipe(name: str, changes: Sequence[str], *, allow_code: bool) -> tuple[Recipe, str, bool]:
    """A recipe to begin a run with: the recipe, its name, and whether its code may be imported.

    Code named in a recipe that one passes is imported, since one has chosen the file; in a
    recipe that lies inside a run, only if `allow_code` says so.
    """
    path = find(name)
    return read(path, changes), path.stem, allow_code or not is_run(path.absolute().parent)


def begin(recipe: Recipe, folder: Path) -> Run:
    """A new run of a recipe.

    Raises:
        RunError: a folder that exists.
    """
    if is_run(folder):
        raise RunError(
            f"{folder} is a run already, and is not written over. "
            f"Continue it with 'anybatch resume {folder}', or choose another folder by --out."
        )
    run = _open(recipe, folder)
    _write(folder / "recipe.toml", text_of(recipe).encode())
    return run


def reopen(folder: Path, changes: Sequence[str] = ()) -> tuple[Recipe, Run]:
    """A run to be continued, with changes of free keys recorded.

    Raises:
        RunError: no run; RecipeError: a key that changes arithmetic.
    """
    before = _recipe_of(folder)
    recipe = with_changes(before, changes)
    run = _open(recipe, folder)
    if recipe != before:
        _write(folder / "recipe.toml", text_of(recipe).encode())
        run.record({"kind": "session", "step": 0, "changes": list(changes)})
    return recipe, run


def train(built: Built, run: Run) -> Iterator[Progress]:
    """Train from where the run is, to the end of its recipe.

    Raises:
        DivergenceError: a loss that is not finite, or `DIVERGED`.
    """
    num_steps = built.order.num_steps(built.recipe.run.epochs)
    first = _first_loss(run)
    built.model.train()
    for step in steps(
        built.model,
        built.objective,
        built.optimizer,
        tuple(built.data.train),
        order=built.order,
        epochs=built.recipe.run.epochs,
        layout=built.layout,
        clip=built.clip,
        schedule=built.schedule,
        run=run,
    ):
        first = step.loss if first is None else first
        if step.loss > DIVERGED * max(abs(first), 1.0):
            raise DivergenceError(
                f"the loss grew from {first:.4g} to {step.loss:.4g} by update {step.step} of epoch "
                f"{step.epoch}: the run diverges at learning rate {step.lr:g}. Lower it, warm up, "
                f"or clip. The checkpoints of {run.folder} are kept."
            )
        held_out = None
        if step.ends_epoch:
            held_out = evaluate(built.model, built.objective, tuple(built.data.held_out))
            run.record(
                {"kind": "evaluation", "step": step.step, "split": "held_out"} | asdict(held_out)
            )
        yield Progress(step, num_steps, held_out)


def restored(folder: Path, *, allow_code: bool) -> tuple[Built, Checkpoint]:
    """A run's model and data as of its newest good checkpoint.

    Raises:
        RunError: no run, or one without a checkpoint; CheckpointError: none that verifies.
    """
    recipe = _recipe_of(folder)
    checkpoint = _newest(folder)
    if checkpoint.settings.get("recipe") != fingerprint(recipe):
        raise RunError(
            f"{folder / 'recipe.toml'} is not the recipe that {checkpoint.path.name} was made "
            f"with: was it edited? Put it back, or begin a new run."
        )
    built = build(recipe, allow_code=allow_code)
    TrainingState(built.model, built.optimizer).restore(checkpoints.load(checkpoint))
    return built, checkpoint


def evaluation_of(built: Built, part: str) -> Evaluation:
    """Loss and metrics of a part of the data: "train" or "held_out"."""
    return evaluate(built.model, built.objective, tuple(getattr(built.data, part)))


def predictions(built: Built, part: str) -> Iterator[dict[str, Any]]:
    """A row an example of that part: its target, outputs, and class where there are classes."""
    examples = getattr(built.data, part)
    made: list[Tensor] = outputs(
        built.model, lambda batch, _: built.model(batch[0]).cpu(), tuple(examples)
    )
    classes = built.recipe.objective.loss == "cross_entropy"
    for number, (output, target) in enumerate(zip(torch.cat(made), examples.targets, strict=True)):
        row = {"example": number, "target": target.tolist(), "outputs": output.tolist()}
        yield row | ({"class": int(output.argmax())} if classes else {})


def export(built: Built, file: Path) -> int:
    """Write weights and buffers as safetensors.

    Returns:
        How many tensors.

    Raises:
        RunError: a file that exists.
    """
    from safetensors.torch import save

    state = built.model.state_dict()
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    write_new(file, save(tensors, metadata={"format": "pt"}))
    return len(tensors)


def write_new(file: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunError: a file that exists, or a folder that does not.
    """
    if file.exists():
        raise RunError(f"{file} exists and is not written over: choose another name by --out.")
    if not file.parent.is_dir():
        raise RunError(f"{file.parent} is no folder, expected one to write {file.name} into.")
    _write(file, content)


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a run's checkpoints.

    Returns:
        Step and digest of the newest good one, whether all are good, and what is wrong.
    """
    _recipe_of(folder)
    rows, newest = [], None
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            checkpoint = checkpoints.verify(path)
            checkpoints.load(checkpoint)
            newest = newest or checkpoint
            rows.append({"checkpoint": path.name, "ok": True, "digest": checkpoint.digest})
        except CheckpointError as error:
            rows.append({"checkpoint": path.name, "ok": False, "reason": str(error)})
    return {
        "run": str(folder),
        "step": newest.step if newest else None,
        "digest": newest.digest if newest else None,
        "ok": newest is not None and all(row["ok"] for row in rows),
        "checkpoints": rows,
    }


def _newest(folder: Path) -> Checkpoint:
    scan = checkpoints.newest(folder / "checkpoints")
    if scan.found is None:
        kind = CheckpointError if scan.refused else RunError
        raise kind(scan.explain())
    return scan.found


def _recipe_of(folder: Path) -> Recipe:
    if not is_run(folder):
        raise RunError(
            f"{folder} is no run: expected a folder that 'anybatch train' has made, with run.json "
            f"and recipe.toml in it."
        )
    if not (folder / "recipe.toml").is_file():
        raise RunError(
            f"{folder} has no recipe.toml: it was made by a script's own loop. Run that script "
            f"again to continue it."
        )
    return read(folder / "recipe.toml")


def _open(recipe: Recipe, folder: Path) -> Run:
    return Run(
        folder,
        checkpoint_every=recipe.run.checkpoint_every,
        keep=recipe.run.keep,
        settings={"recipe": fingerprint(recipe)},
    )


def _first_loss(run: Run) -> float | None:
    rows = read_records(run.folder / "records.jsonl")
    return next((float(row["loss"]) for row in rows if row["kind"] == "step"), None)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
