"""Make the page of one update of a run: `anybatch explain`."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anybatch
from anybatch.data.names import class_names, feature_names
from anybatch.errors import RunError
from anybatch.examples import count_examples
from anybatch.ledger import Observe
from anybatch.optim.rates import set_rates
from anybatch.randomness import Key
from anybatch.recipe.build import CLASS_LOSSES, Setup
from anybatch.recipe.results import compute_outputs
from anybatch.recipe.runs import check_run
from anybatch.report.evidence import Evidence, collect_evidence
from anybatch.report.examples import Labels
from anybatch.report.explain import Explanation
from anybatch.report.history import Columns, Rows, describe_history, read_run_ledger
from anybatch.report.noise import NEEDED, estimate_noise_over_training
from anybatch.report.replay import (
    Position,
    get_arguments,
    read_batch,
    read_examples,
    restore_position,
)
from anybatch.report.sections import describe_sections
from anybatch.runs import checkpoints
from anybatch.runs.records import read_recipe_records
from anybatch.training.evaluation import map_micro_batches

__all__ = ["explain_run", "parse_ids"]


def explain_run(
    folder: Path,
    *,
    step: int | None = None,
    ids: Tensor | None = None,
    reason: str | None = None,
    allow_code: bool = False,
    accept_data: bool = False,
) -> tuple[Explanation, int]:
    """Make the page of one update of a run. The update is computed again; the run stays as it is.

    Args:
        step: the update, from 0; None: see `choose_step`.
        ids: [B], examples to use for the update; None: the batch of that step.
        reason: why that step is shown, in words.

    Returns:
        The page, and the step.

    Raises:
        RunError: no run, or a step or example that does not exist; and what building raises.
    """
    check_run(folder)
    place = restore_position(folder, step, allow_code=allow_code, accept_data=accept_data)
    place = replace(place, reason=reason or place.reason)
    setup, t, is_chosen = place.setup, place.step, ids is not None
    if ids is None:
        batch = read_batch(setup, t)
        examples, ids, key = batch.examples, batch.ids, batch.key
    else:
        examples, key = _read_examples(setup, ids), Key(setup.order.seed, t)
    set_rates(setup.optimizer, setup.schedule(setup.order.examples_before(t)))
    arguments = get_arguments(place) | {"key": key}
    labels = _collect_labels(setup, examples, ids)
    evidence = collect_evidence(
        setup.model, setup.objective, examples, setup.optimizer, ids=ids, **arguments
    )
    rows, ledger = read_recipe_records(folder / "records.jsonl"), read_run_ledger(folder, setup)
    over_training, why = _estimate_noise(place, ledger[0], evidence)
    sections = describe_sections(
        evidence,
        labels,
        _describe_head(folder, place, evidence, rows, is_chosen=is_chosen),
        history=describe_history(folder, setup, labels, rows, ledger),
        noise_over_training=over_training,
        why_no_noise=why,
    )
    return Explanation(sections), t


def parse_ids(text: str) -> Tensor:
    """Read example ids from a text such as "3,17,200".

    Raises:
        RunError: the text is no list of numbers.
    """
    if not re.fullmatch(r"\s*\d{1,18}\s*(,\s*\d{1,18}\s*)*", text):
        raise RunError(
            f"--batch is {text!r}. It takes ids of examples, separated by commas, such as 3,17,200."
        )
    return torch.tensor([int(number) for number in text.split(",")])


def _read_examples(setup: Setup, ids: Tensor) -> Any:
    total = count_examples(setup.data.columns)
    outside = [int(i) for i in ids if not 0 <= int(i) < total]
    if outside:
        raise RunError(
            f"There is no example {outside[0]}. The data have the ids 0 to {total - 1}, as in the "
            f"ledger and in 'anybatch predict'."
        )
    return read_examples(setup, ids)


def _collect_labels(setup: Setup, examples: Any, ids: Tensor) -> Labels:
    """Collect names of classes, features and letters, and the classes that the model predicts."""
    section = setup.recipe.data
    labels: dict[str, Any] = {
        "names": class_names(section.name, section.args),
        "features": feature_names(section.name, section.args),
        "vocabulary": getattr(setup.data, "vocabulary", None),
    }
    if setup.recipe.objective.loss in CLASS_LOSSES and setup.data.targets is not None:
        data = setup.data.select(ids)
        batches = map_micro_batches(
            setup.model,
            lambda batch, size: compute_outputs(setup, batch, size),
            data.columns,
            collate=data.collate,
        )
        labels["classes"] = setup.data.targets[ids]
        labels["predicted"] = torch.cat([output.argmax(1) for output in batches])
    return Labels(**labels)


def _describe_head(
    folder: Path, place: Position, evidence: Evidence, rows: Rows, *, is_chosen: bool
) -> dict[str, Any]:
    """Describe the run and the update for the head of the page."""
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


def _estimate_noise(
    place: Position, columns: Columns, evidence: Evidence
) -> tuple[list[dict[str, Any]], str]:
    """Estimate noise scales over the run, from its ledger or at its checkpoints."""
    if evidence.ledger.noise_scale is None:
        return [], ""
    (reduction,) = place.setup.objective.reductions.values()
    if columns is not None and all(name in columns for name in NEEDED):
        return estimate_noise_over_training(columns, reduction), ""
    return _estimate_at_checkpoints(place), (
        "measured on one batch of each checkpoint. The run has no ledger with alignments: train "
        "with observe.norms=true and observe.alignment=true for a curve."
    )


def _estimate_at_checkpoints(place: Position) -> list[dict[str, Any]]:
    """Estimate the noise scale at each checkpoint, and restore the weights."""
    setup, scales = place.setup, []
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    for checkpoint in reversed(place.checkpoints):
        setup.model.load_state_dict(checkpoints.load(checkpoint)["model"])
        batch = read_batch(setup, checkpoint.step)
        arguments = get_arguments(place) | {"key": batch.key}
        observe = Observe(norms=False, noise_scale=True)
        gradient = setup.compute_gradient(batch.examples, observe=observe, **arguments)
        assert gradient.ledger is not None
        assert gradient.ledger.noise_scale is not None
        scales.append(
            {"first": checkpoint.step, "last": checkpoint.step}
            | asdict(gradient.ledger.noise_scale)
        )
    setup.model.load_state_dict(before)
    return scales
