"""What comes out of a run: evaluations, predictions, weights, and the proof that it is whole."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from anybatch.batch import get_inputs
from anybatch.errors import AnybatchError, CheckpointError, ModelError, RunError
from anybatch.precision import autocast
from anybatch.recipe.build import CLASS_LOSSES, Built, Part, build
from anybatch.recipe.code import may_import_again
from anybatch.recipe.datasets import NOT_COMPARED, compare_if_readable
from anybatch.recipe.runs import carried, check_run, compare_data, newest, recipe_of
from anybatch.recipe.schema import Recipe
from anybatch.training import checkpoints
from anybatch.training.checkpoints import Checkpoint
from anybatch.training.checksums import MARK, Checksums
from anybatch.training.data_fingerprint import data_of_settings
from anybatch.training.disk import read_file, replace_file
from anybatch.training.evaluation import device_of, outputs
from anybatch.training.records import read_records
from anybatch.training.state import TrainingState

__all__ = [
    "check_ids",
    "check_new",
    "describe_origin",
    "export",
    "output_of",
    "predictions",
    "restored",
    "verify",
    "write_new",
]

_log = logging.getLogger(__name__)

_ATTEMPTS = 5  # to verify a run that goes on meanwhile


def restored(
    folder: Path, *, allow_code: bool, accept_data: bool = False
) -> tuple[Built, Checkpoint]:
    """A run's model and data as of its newest good checkpoint.

    Where the recipe asks for an average, the model has the averages as its weights.

    Raises:
        RunError: no run, one without a checkpoint, or other data than it was trained on, unless
            they are accepted; CheckpointError: none that verifies.
    """
    recipe = recipe_of(folder)
    scan = newest(folder, recipe)
    if scan.found is None:
        kind = CheckpointError if scan.refused else RunError
        raise kind(scan.explain())
    if scan.refused:
        _log.warning("an older checkpoint is used: %s", scan.explain())
    may = may_import_again(folder, recipe, allow_code=allow_code)
    built = build(recipe, allow_code=may, fresh=False)
    compare_data(folder, scan.found, built, accept=accept_data)
    state = TrainingState(built.model, built.optimizer, carried(built))
    state.restore(checkpoints.load(scan.found))
    if built.average is not None:
        built.average.copy_to(built.model)
    return built, scan.found


def describe_origin(folder: Path, built: Built, checkpoint: Checkpoint) -> dict[str, Any]:
    """Say which run, update, epoch and weights a restored model is from.

    The weights are those of the "last" update, or their "average".
    """
    step = checkpoint.step
    return {
        "run": str(folder),
        "step": step,
        "epoch": built.order.epoch(step - 1) + 1 if step else 0,
        "weights": "last" if built.average is None else "average",
    }


def predictions(built: Built, part: Part) -> Iterator[dict[str, Any]]:
    """Predict each example of a part of the data.

    Yields:
        Its id in the data, outputs, and the target where it is known. Where there are classes: the
        class, its probability under cross_entropy, and the labels that data.args.labels gives to
        class and target.

    Raises:
        ModelError: a model whose output is not a tensor with the examples first.
    """
    examples, ids = built.part(part), getattr(built.parts, part)
    made = outputs(
        built.model,
        lambda batch, size: output_of(built, batch, size),
        examples.columns,
        collate=examples.collate,
    )
    every = (output for outputs_of_part in made for output in outputs_of_part)
    for place, (example, output) in enumerate(zip(ids.tolist(), every, strict=True)):
        row = {"example": example, "outputs": output.tolist()}
        if examples.targets is not None:
            row["target"] = examples.targets[place].tolist()
        yield row | _class_of(built, output, row.get("target"))


def _class_of(built: Built, output: Tensor, target: Any) -> dict[str, Any]:
    """Name the class that an output stands for; nothing where there are no classes."""
    loss, labels = built.recipe.objective.loss, built.recipe.data.args.get("labels", ())
    is_labelled = isinstance(labels, list) and output.shape == (len(labels),)
    if loss not in CLASS_LOSSES and not (is_labelled and isinstance(target, int)):
        return {}
    found: dict[str, Any] = {"class": int(output.argmax())}
    if loss == "cross_entropy":
        found["probability"] = float(output.double().softmax(-1).max())
    if is_labelled:
        found["label"] = labels[found["class"]]
        if isinstance(target, int) and 0 <= target < len(labels):
            found["target_label"] = labels[target]
    return found


def export(built: Built, file: Path) -> int:
    """Write weights and buffers as safetensors.

    Returns:
        How many tensors.

    Raises:
        RunError: a file that exists.
    """
    from safetensors.torch import save

    state = built.model.state_dict()
    tensors = {
        name: value.detach().cpu().contiguous().clone()  # cloned: tied weights share memory
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    write_new(file, save(tensors, metadata={"format": "pt"}))
    return len(tensors)


def check_new(file: Path) -> None:
    """See that a file can be written, before it is worked for.

    Raises:
        RunError: a file that exists, or a folder that does not.
    """
    if os.path.lexists(file):
        raise RunError(f"{file} exists and is not written over: choose another name by --out.")
    if not file.parent.is_dir():
        raise RunError(f"{file.parent} is no folder, expected one to write {file.name} into.")


def write_new(file: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunError: a file that exists, or a folder that does not.
    """
    check_new(file)
    replace_file(file, [content])


def verify(folder: Path, *, accept_data: bool = False) -> dict[str, Any]:
    """Read every byte of a run that has a checksum, and compare its data where they can be read.

    Returns:
        Step and digest of the newest good checkpoint, a row for each, and whether all is well
        ("ok"); "error" says what is not, and "unchecked" what has no checksum.

    Raises:
        RunError: no run.
    """
    check_run(folder)
    for _ in range(_ATTEMPTS):
        mark, found = read_file(folder / MARK), _verify(folder, accept_data=accept_data)
        if found["ok"] or read_file(folder / MARK) == mark:
            break  # otherwise the run has gone on meanwhile
    return found


def _verify(folder: Path, *, accept_data: bool) -> dict[str, Any]:
    errors, unchecked = _check_files(folder)
    rows = [_row(path) for path in checkpoints.named(folder / "checkpoints")]
    good = [row for row in rows if row["ok"]]
    errors += [row["error"] for row in rows if not row["ok"]]
    data = NOT_COMPARED
    if not rows:
        errors.append(f"{folder} has no checkpoint yet, expected one after its first epoch.")
    if good and (folder / "recipe.toml").exists():
        try:
            recipe = recipe_of(folder)
            before = _data_of_newest(folder, recipe)
            data = compare_if_readable(folder, recipe, before, accept=accept_data)
        except AnybatchError as error:
            errors.append(str(error))
    return {
        "run": str(folder),
        "step": good[0]["step"] if good else None,
        "digest": good[0]["digest"] if good else None,
        "data": data,
        "ok": not errors,
        **({"error": "\n".join(errors)} if errors else {}),
        **({"unchecked": unchecked} if unchecked else {}),
        "checkpoints": rows,
    }


def check_ids(folder: Path, *, accept_data: bool) -> None:
    """Check that the ids of a run's examples still name the same examples; warn if nothing tells.

    Raises:
        RunError: no run, or other data; CheckpointError: no checkpoint verifies.
    """
    check_run(folder)
    if (folder / "recipe.toml").is_file():
        recipe = recipe_of(folder)
        before = _data_of_newest(folder, recipe)
        data = compare_if_readable(folder, recipe, before, accept=accept_data)
        if data.startswith(NOT_COMPARED):
            _log.warning("the data of %s are %s", folder, data)


def _data_of_newest(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the fingerprint that the newest checkpoint holds, if there is one.

    Raises:
        CheckpointError: there are checkpoints, and none verifies.
    """
    scan = newest(folder, recipe)
    if scan.found is None and scan.refused:
        raise CheckpointError(scan.explain())
    return None if scan.found is None else data_of_settings(scan.found.settings)


def _check_files(folder: Path) -> tuple[list[str], list[str]]:
    """Find what is wrong with the files of a run, and what cannot be checked."""
    records = folder / "records.jsonl"
    try:
        checksums = Checksums.read(folder)
        if checksums.is_old:
            what = f"all but the checkpoints: anybatch {checksums.version} kept no checksums of it"
            return [], [what]
        errors = checksums.find_damage() + checksums.find_foreign()
        unchecked = checksums.find_unchecked()
        num_rows = checksums.num_rows_since(records) if not errors else 0
        if num_rows:
            unchecked.append(
                f"{num_rows} rows of {records.name}, written since the last checkpoint"
            )
            read_records(records)
    except RunError as error:
        return [str(error)], []
    return errors, unchecked


def output_of(built: Built, batch: Any, size: int) -> Tensor:
    """What the model makes of a batch, in the run's precision: [size, ...].

    Raises:
        ModelError: no tensor with the examples first.
    """
    with autocast(built.recipe.run.precision, device_of(built.model)):
        output = built.model(get_inputs(batch))
    if not isinstance(output, Tensor) or output.shape[:1] != (size,):
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"the model gave {came} for {size} examples, expected a tensor with the examples "
            f"first. Predict with a model that returns one."
        )
    return output.cpu()


def _row(path: Path) -> dict[str, Any]:
    try:
        found = checkpoints.verify(path)
        checkpoints.load(found)  # the digest, too
    except CheckpointError as error:
        return {"checkpoint": path.name, "ok": False, "error": str(error)}
    return {"checkpoint": path.name, "ok": True, "step": found.step, "digest": found.digest}
