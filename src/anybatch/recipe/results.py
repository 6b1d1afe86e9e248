"""Use the model of a run: restore, predict and export it, and verify the files of the run."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from anybatch.batch import get_inputs
from anybatch.errors import AnybatchError, CheckpointError, ModelError, RunError
from anybatch.precision import autocast
from anybatch.recipe.build import CLASS_LOSSES, Setup, Split, build
from anybatch.recipe.code import permit_code
from anybatch.recipe.datasets import NOT_COMPARED, compare_run_data
from anybatch.recipe.runs import check_run, compare_data, find_newest, read_run_recipe
from anybatch.recipe.train import collect_state
from anybatch.runs import checkpoints
from anybatch.runs.checkpoints import Checkpoint
from anybatch.runs.checksums import MARK, Checksums
from anybatch.runs.data_fingerprint import get_fingerprint
from anybatch.runs.disk import read_file, replace_file
from anybatch.runs.records import read_records
from anybatch.runs.state import TrainingState
from anybatch.training.evaluation import find_device, map_micro_batches

__all__ = [
    "check_ids",
    "check_new_file",
    "compute_outputs",
    "describe_origin",
    "export_weights",
    "predict_examples",
    "restore_run",
    "verify_run",
    "write_new_file",
]

_log = logging.getLogger(__name__)

_ATTEMPTS = 5  # to verify a run that is training meanwhile


def restore_run(
    folder: Path, *, allow_code: bool, accept_data: bool = False
) -> tuple[Setup, Checkpoint]:
    """Build the model and data of a run, and load its newest good checkpoint.

    If the recipe asks for an average, the model gets the averages as its weights.

    Raises:
        RunError: the folder is no run, or has no checkpoint, or the data are others and are not
            accepted; CheckpointError: every checkpoint is damaged.
    """
    recipe = read_run_recipe(folder)
    scan = find_newest(folder, recipe)
    if scan.checkpoint is None:
        kind = CheckpointError if scan.refusals else RunError
        raise kind(scan.explain())
    if scan.refusals:
        _log.warning("an older checkpoint is used: %s", scan.explain())
    allow_code = permit_code(folder, recipe, allow_code=allow_code)
    setup = build(recipe, allow_code=allow_code, fresh=False)
    compare_data(folder, scan.checkpoint, setup, accept=accept_data)
    state = TrainingState(setup.model, setup.optimizer, collect_state(setup))
    state.restore(checkpoints.load(scan.checkpoint))
    if setup.average is not None:
        setup.average.copy_to(setup.model)
    return setup, scan.checkpoint


def describe_origin(folder: Path, setup: Setup, checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe which run, update, epoch and weights a restored model is from.

    The weights are those of the "last" update, or their "average".
    """
    step = checkpoint.step
    return {
        "run": str(folder),
        "step": step,
        "epoch": setup.order.epoch(step - 1) + 1 if step else 0,
        "weights": "last" if setup.average is None else "average",
    }


def predict_examples(setup: Setup, split: Split) -> Iterator[dict[str, Any]]:
    """Predict each example of a split.

    Yields:
        Its id in the data, the outputs, and the target if there is one. If there are classes: the
        class, its probability under cross_entropy, and the labels that data.args.labels gives to
        class and target.

    Raises:
        ModelError: the model's output is not a tensor with the examples first.
    """
    examples, ids = setup.select_split(split), getattr(setup.splits, split)
    batches = map_micro_batches(
        setup.model,
        lambda batch, size: compute_outputs(setup, batch, size),
        examples.columns,
        collate=examples.collate,
    )
    rows = (output for batch in batches for output in batch)
    for place, (example, output) in enumerate(zip(ids.tolist(), rows, strict=True)):
        row = {"example": example, "outputs": output.tolist()}
        if examples.targets is not None:
            row["target"] = examples.targets[place].tolist()
        yield row | _describe_class(setup, output, row.get("target"))


def _describe_class(setup: Setup, output: Tensor, target: Any) -> dict[str, Any]:
    """Describe the class that an output stands for; {} if there are no classes."""
    loss, labels = setup.recipe.objective.loss, setup.recipe.data.args.get("labels", ())
    has_labels = isinstance(labels, list) and output.shape == (len(labels),)
    if loss not in CLASS_LOSSES and not (has_labels and isinstance(target, int)):
        return {}
    row: dict[str, Any] = {"class": int(output.argmax())}
    if loss == "cross_entropy":
        row["probability"] = float(output.double().softmax(-1).max())
    if has_labels:
        row["label"] = labels[row["class"]]
        if isinstance(target, int) and 0 <= target < len(labels):
            row["target_label"] = labels[target]
    return row


def compute_outputs(setup: Setup, batch: Any, size: int) -> Tensor:
    """Compute the model's outputs for a batch, in the run's precision: [size, ...].

    Raises:
        ModelError: they are not a tensor with the examples first.
    """
    with autocast(setup.recipe.run.precision, find_device(setup.model)):
        output = setup.model(get_inputs(batch))
    if not isinstance(output, Tensor) or output.shape[:1] != (size,):
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"the model gave {kind} for {size} examples. Expected a tensor with the examples "
            f"first. Predict with a model that returns one."
        )
    return output.cpu()


def export_weights(setup: Setup, file: Path) -> int:
    """Write weights and buffers as safetensors.

    Returns:
        Number of tensors.
    """
    from safetensors.torch import save

    tensors = {
        name: value.detach().cpu().contiguous().clone()  # cloned: tied weights share memory
        for name, value in setup.model.state_dict().items()
        if isinstance(value, Tensor)
    }
    write_new_file(file, save(tensors, metadata={"format": "pt"}))
    return len(tensors)


def check_new_file(file: Path, option: str = "--out") -> None:
    """Check that a file can be written, before the work for it begins.

    Raises:
        RunError: the file exists, or its folder does not.
    """
    if os.path.lexists(file):
        raise RunError(f"{file} exists and is not written over. Choose another name by {option}.")
    if not file.absolute().parent.is_dir():
        raise RunError(f"{file.parent} is no folder. Expected one to write {file.name} into.")


def write_new_file(file: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunError: the file exists, or its folder does not.
    """
    check_new_file(file)
    replace_file(file, [content])


def verify_run(folder: Path, *, accept_data: bool = False) -> dict[str, Any]:
    """Verify every checksum of a run, and compare its data if they can be read.

    Returns:
        Step and digest of the newest good checkpoint, a row for each checkpoint, and whether all
        is well ("ok"); "error" says what is wrong, and "unchecked" what has no checksum.
    """
    check_run(folder)
    for _ in range(_ATTEMPTS):
        mark, report = read_file(folder / MARK), _verify_once(folder, accept_data=accept_data)
        if report["ok"] or read_file(folder / MARK) == mark:
            break  # otherwise training has written more meanwhile
    return report


def _verify_once(folder: Path, *, accept_data: bool) -> dict[str, Any]:
    errors, unchecked = _check_files(folder)
    rows = [_verify_checkpoint(path) for path in checkpoints.list_paths(folder / "checkpoints")]
    good = [row for row in rows if row["ok"]]
    errors += [row["error"] for row in rows if not row["ok"]]
    data = NOT_COMPARED
    if not rows:
        errors.append(f"{folder} has no checkpoint yet. The first one comes after an epoch.")
    if good and (folder / "recipe.toml").exists():
        try:
            data = _compare_data(folder, accept=accept_data)
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
    """Check that the ids of a run still name the same examples; warn if the data cannot be read.

    Raises:
        RunError: the folder is no run, or the data are others; CheckpointError: every checkpoint
            is damaged.
    """
    check_run(folder)
    if (folder / "recipe.toml").is_file():
        data = _compare_data(folder, accept=accept_data)
        if data.startswith(NOT_COMPARED):
            _log.warning("the data of %s are %s", folder, data)


def _compare_data(folder: Path, *, accept: bool) -> str:
    """Compare the data here with those of the newest checkpoint: see `compare_run_data`."""
    recipe = read_run_recipe(folder)
    scan = find_newest(folder, recipe)
    if scan.checkpoint is None and scan.refusals:
        raise CheckpointError(scan.explain())
    fingerprint = None if scan.checkpoint is None else get_fingerprint(scan.checkpoint.settings)
    # Only code that the user has said yes to before: these commands do not ask.
    may = permit_code(folder, recipe, allow_code=False, warn_of_changes=False)
    return compare_run_data(folder, recipe, fingerprint, accept=accept, allow_code=may)


def _check_files(folder: Path) -> tuple[list[str], list[str]]:
    """List what is wrong with the files of a run, and what cannot be checked."""
    records = folder / "records.jsonl"
    try:
        checksums = Checksums.read(folder)
        if checksums.is_old:
            version = checksums.version
            return [], [f"all but the checkpoints: anybatch {version} wrote no checksums of it"]
        errors = checksums.find_damage() + checksums.find_foreign()
        unchecked = checksums.find_unchecked()
        num_rows = checksums.count_new_rows(records) if not errors else 0
        if num_rows:
            unchecked.append(
                f"{num_rows} rows of {records.name}, written since the last checkpoint"
            )
            read_records(records)
    except RunError as error:
        return [str(error)], []
    return errors, unchecked


def _verify_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = checkpoints.verify(path)
        checkpoints.load(checkpoint)  # verifies the digest
    except CheckpointError as error:
        return {"checkpoint": path.name, "ok": False, "error": str(error)}
    step, digest = checkpoint.step, checkpoint.digest
    return {"checkpoint": path.name, "ok": True, "step": step, "digest": digest}
