"""`anybatch explain`: one update of a run as a page."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anybatch
from anybatch.data.names import class_names, feature_names
from anybatch.errors import RunError
from anybatch.gradient import batch_gradient
from anybatch.ledger import Observe
from anybatch.randomness import Key
from anybatch.recipe.build import CLASS_LOSSES, Setup
from anybatch.recipe.results import check_new_file, compute_outputs, write_new_file
from anybatch.recipe.runs import check_run
from anybatch.report.evidence import Evidence, evidence_of
from anybatch.report.examples import Labels
from anybatch.report.explain import Explanation
from anybatch.report.history import Columns, Rows, history, ledger_of
from anybatch.report.noise import NEEDED, noise_over_training
from anybatch.report.replay import Position, arguments, batch_of_ids, batch_of_step, position
from anybatch.report.sections import sections
from anybatch.training import checkpoints
from anybatch.training.batches import num_examples
from anybatch.training.evaluation import outputs
from anybatch.training.optimizers import set_rates
from anybatch.training.records import read_recipe_records

__all__ = ["explain_run", "ids_of", "write_page"]


def explain_run(
    folder: Path,
    *,
    step: int | None = None,
    ids: Tensor | None = None,
    allow_code: bool = False,
    accept_data: bool = False,
) -> tuple[Explanation, int]:
    """Make the page of one update of a run. The update is made again; nothing of the run changes.

    Args:
        folder: the run.
        step: the update, from 0; None: an early one that shows something, see `default_step`.
        ids: [B], examples to make it of, in place of the batch of that step.
        allow_code: whether code that the run's recipe names may be imported.
        accept_data: whether other data than the run's are accepted.

    Returns:
        The page, and the step.

    Raises:
        RunError: no run, or a step or example that it has not; and what building raises.
    """
    check_run(folder)
    place = position(folder, step, allow_code=allow_code, accept_data=accept_data)
    setup, t, is_chosen = place.setup, place.step, ids is not None
    if ids is None:
        batch = batch_of_step(setup, t)
        examples, ids, key = batch.examples, batch.ids, batch.key
    else:
        examples, key = _examples(setup, ids), Key(setup.order.seed, t)
    set_rates(setup.optimizer, setup.schedule(setup.order.examples_before(t)))
    how = arguments(place) | {"key": key}
    labels = _labels(setup, examples, ids)
    evidence = evidence_of(setup.model, setup.objective, examples, setup.optimizer, ids=ids, **how)
    rows, ledger = read_recipe_records(folder / "records.jsonl"), ledger_of(folder, setup)
    over_training, why = _noise(place, ledger[0], evidence)
    found = sections(
        evidence,
        labels,
        _about(folder, place, evidence, rows, is_chosen=is_chosen),
        history=history(folder, setup, labels, rows, ledger),
        noise_over_training=over_training,
        why_no_noise=why,
    )
    return Explanation(found), t


def write_page(
    folder: Path, path: Path, step: int | None = None, *, allow_code: bool = False
) -> Explanation:
    """Write the page of one update of a run into a new file.

    Args:
        folder, step, allow_code: see `explain_run`.
        path: the file.

    Raises:
        RunError: the file exists; and what `explain_run` raises.
    """
    check_new_file(path)
    page, _ = explain_run(folder, step=step, allow_code=allow_code)
    write_new_file(path, page.html.encode())
    return page


def ids_of(text: str) -> Tensor:
    """Read example ids from a text such as "3,17,200".

    Raises:
        RunError: the text is no list of numbers.
    """
    if not re.fullmatch(r"\s*\d{1,18}\s*(,\s*\d{1,18}\s*)*", text):
        raise RunError(
            f"--batch is {text!r}. It takes ids of examples with commas between, such as 3,17,200."
        )
    return torch.tensor([int(number) for number in text.split(",")])


def _examples(setup: Setup, ids: Tensor) -> Any:
    total = num_examples(setup.data.columns)
    outside = [int(i) for i in ids if not 0 <= int(i) < total]
    if outside:
        raise RunError(
            f"There is no example {outside[0]}. The data have the ids 0 to {total - 1}, as in the "
            f"ledger and in 'anybatch predict'."
        )
    return batch_of_ids(setup, ids)


def _labels(setup: Setup, examples: Any, ids: Tensor) -> Labels:
    """Gather names of classes, features and letters, and the class that the model predicts."""
    section = setup.recipe.data
    found: dict[str, Any] = {
        "names": class_names(section.name, section.args),
        "features": feature_names(section.name, section.args),
        "vocabulary": getattr(setup.data, "vocabulary", None),
    }
    if setup.recipe.objective.loss in CLASS_LOSSES and setup.data.targets is not None:
        data = setup.data.of_ids(ids)
        made = outputs(
            setup.model,
            lambda batch, size: compute_outputs(setup, batch, size),
            data.columns,
            collate=data.collate,
        )
        found["classes"] = setup.data.targets[ids]
        found["predicted"] = torch.cat([output.argmax(1) for output in made])
    return Labels(**found)


def _about(
    folder: Path, place: Position, evidence: Evidence, rows: Rows, *, is_chosen: bool
) -> dict[str, Any]:
    """Gather what the head of the page says."""
    setup, t = place.setup, place.step
    recorded = [row for row in rows if row["kind"] == "step" and row["step"] == t]
    same = recorded[0] if recorded and not is_chosen else None
    return {
        "title": folder.resolve().name,
        "step": t,
        "epoch": setup.order.epoch(t),
        "reason": place.reason,
        "epoch_steps": setup.order.num_steps(1),
        "num_steps": setup.order.num_steps(setup.recipe.run.epochs),
        "is_chosen": is_chosen,
        "base": None if place.base is None else place.base.step,
        "replayed": t - (0 if place.base is None else place.base.step),
        "recorded_loss": None if same is None else same["loss"],
        "model": setup.recipe.model.name,
        "data": setup.recipe.data.name,
        "loss_name": setup.recipe.objective.loss,
        "precision": setup.recipe.run.precision,
        "dtype": setup.recipe.run.dtype,
        "weights": sum(w.numel() for w in evidence.before.values()),
        "anybatch": anybatch.__version__,
        "torch": torch.__version__,
    }


def _noise(
    place: Position, columns: Columns, evidence: Evidence
) -> tuple[list[dict[str, Any]], str]:
    """Estimate noise scales over the run, from its ledger or at the checkpoints that it keeps."""
    if evidence.ledger.noise_scale is None:
        return [], ""
    (reduction,) = place.setup.objective.reductions.values()
    if columns is not None and all(name in columns for name in NEEDED):
        return noise_over_training(columns, reduction), ""
    return _at_checkpoints(place), (
        "measured on one batch of each checkpoint. The run has no ledger with alignments: train "
        "with observe.norms=true and observe.alignment=true for a curve."
    )


def _at_checkpoints(place: Position) -> list[dict[str, Any]]:
    """Estimate the noise scale at each checkpoint, and put the weights back."""
    setup, found = place.setup, []
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    for one in reversed(place.checkpoints):
        setup.model.load_state_dict(checkpoints.load(one)["model"])
        batch = batch_of_step(setup, one.step)
        how = arguments(place) | {"key": batch.key}
        observe = Observe(norms=False, noise_scale=True)
        gradient = batch_gradient(
            setup.model, setup.objective, batch.examples, observe=observe, **how
        )
        assert gradient.ledger is not None
        assert gradient.ledger.noise_scale is not None
        found.append({"first": one.step, "last": one.step} | asdict(gradient.ledger.noise_scale))
    setup.model.load_state_dict(before)
    return found
