"""Describe a whole run: its curves, most influential examples, classes and checkpoints.

If a curve has more than a few thousand updates, the page shows means over consecutive ones and says
over how many. The data loss is the sum of all parts of the loss except penalties; under Sum it is
that of one example, on average.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.batch import get_inputs
from anybatch.errors import AnybatchError
from anybatch.example_losses import ExampleLosses
from anybatch.examples import count_examples
from anybatch.order import Order
from anybatch.precision import autocast
from anybatch.pytree import prepare_batch
from anybatch.recipe.build import CLASS_LOSSES, Setup
from anybatch.recipe.results import verify_run
from anybatch.reductions import Sum
from anybatch.report.examples import Labels
from anybatch.report.packing import pack
from anybatch.report.pictures import describe_inputs
from anybatch.report.replay import Rows, read_examples, sum_data_loss
from anybatch.runs.ledger_files import By, rank_examples, read_ledger
from anybatch.training.evaluation import find_device, map_micro_batches

__all__ = ["Columns", "Rows", "describe_history", "read_run_ledger"]

Columns = Mapping[str, NDArray[Any]] | None

POINTS = 4000  # of a curve, at most
DRIVERS = 12  # examples of each ranking
HELD_OUT = 2000  # held-out examples that classes are judged by, at most


def describe_history(
    folder: Path, setup: Setup, labels: Labels, rows: Rows, ledger: tuple[Columns, str]
) -> dict[str, Any]:
    """Describe a whole run for a page.

    Args:
        labels: names of its classes.
        ledger: from `read_run_ledger`.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    columns, why = ledger
    penalties = [part.part for part in setup.objective.penalty or ()]
    is_sum = all(isinstance(r, Sum) for r in setup.objective.reductions.values())
    figures: dict[str, Any] = {
        "curves": _describe_curves(steps, penalties, setup, is_sum=is_sum) if steps else None,
        "is_sum": is_sum,
    }
    figures["evaluations"] = [
        {
            "step": row["step"],
            "split": row["split"],
            "data_loss": _divide(
                sum_data_loss(row["parts"], penalties), row.get("num_examples") if is_sum else 1
            ),
            **row["metrics"],
        }
        for row in rows
        if row["kind"] == "evaluation"
    ]
    figures["stopped"] = next((row["reason"] for row in rows if row["kind"] == "stop"), None)
    figures["drivers"] = {"why": why} if columns is None else _rank_drivers(columns, setup, labels)
    figures["classes"] = _describe_classes(setup, labels, columns)
    figures["checkpoints"] = verify_run(folder)["checkpoints"]
    return figures


def read_run_ledger(folder: Path, setup: Setup) -> tuple[Columns, str]:
    """Read the ledger of a run as columns; None and the reason if there is none of these data."""
    if not os.path.lexists(folder / "ledger"):
        return None, "this run has no ledger. Train with --set observe.norms=true to have one."
    try:
        columns = read_ledger(folder)
    except AnybatchError as error:
        return None, str(error)
    ids, total = columns["example"], count_examples(setup.data.columns)
    if len(ids) and not (ids.min() >= 0 and ids.max() < total):
        return None, f"the ledger names examples other than 0 to {total - 1}, which the data have."
    return columns, ""


def _divide(value: float | None, count: int | None) -> float | None:
    """Divide a loss by a count, if both are known."""
    return value / count if value is not None and count else None


def _describe_curves(
    steps: Rows, penalties: Sequence[str], setup: Setup, *, is_sum: bool
) -> dict[str, Any]:
    """Describe every number of the updates as a curve over the steps.

    Under Sum the data loss of a batch is divided by its examples. Otherwise it could not be
    compared with that of the held-out data, which are more.
    """
    before = setup.order.examples_before
    counts = [before(row["step"] + 1) - before(row["step"]) if is_sum else 1 for row in steps]
    width = -(-len(steps) // POINTS)
    names = ("step", "lr", "seconds")
    figures = {name: _average([row[name] for row in steps], width) for name in names}
    nested = {
        kind: {
            name: _average([row.get(kind, {}).get(name) for row in steps], width)
            for name in dict.fromkeys(name for row in steps for name in row.get(kind, {}))
        }
        for kind in ("parts", "averages", "metrics")
    }
    for numbers, kind in ((figures, "parts"), (nested["averages"], "averages")):
        losses = [
            _divide(sum_data_loss({k: row[kind][k] for k in row["parts"]}, penalties), count)
            if kind in row
            else None
            for row, count in zip(steps, counts, strict=True)
        ]
        numbers["data_loss"] = _average(losses, width)
    skipped = [row["step"] for row in steps if row.get("skipped")]
    return {"updates_a_point": width, "skipped": skipped, **figures, **nested}


def _average(values: Sequence[float | None], width: int) -> dict[str, Any]:
    """Average each `width` consecutive values; null is missing."""
    array = np.array([np.nan if value is None else value for value in values], np.float64)
    missing = -len(array) % width
    rows = np.concatenate([array, np.full(missing, np.nan)]).reshape(-1, width)
    exists = ~np.isnan(rows)
    sums = np.where(exists, rows, 0).sum(1)
    return pack(np.where(exists.any(1), sums / np.maximum(exists.sum(1), 1), np.nan))


def _rank_drivers(
    columns: Mapping[str, NDArray[Any]], setup: Setup, labels: Labels
) -> dict[str, Any]:
    """Rank the examples by their means over all visits, with their pictures."""
    by: tuple[By, ...] = ("norm", "loss", "share", "forgetting")
    lists: dict[str, Any] = {}
    for key in by:
        try:
            lists[key] = rank_examples(columns, key, DRIVERS)
        except AnybatchError as error:
            lists[key] = {"why": str(error)}
    rankings = [rows for rows in lists.values() if isinstance(rows, list)]
    ids = sorted({row["example"] for rows in rankings for row in rows})
    targets = setup.data.targets
    batch = read_examples(setup, torch.tensor(ids))
    return {
        "lists": lists,
        "ids": ids,
        "pictures": describe_inputs(get_inputs(prepare_batch(batch)), labels),
        "labels": labels.name_classes(_select_classes(setup, targets, ids)),
    }


def _select_classes(setup: Setup, targets: torch.Tensor | None, ids: Sequence[int]) -> Any:
    is_class = setup.recipe.objective.loss in CLASS_LOSSES and targets is not None
    return targets[torch.tensor(ids)] if is_class and targets is not None else None


def _describe_classes(setup: Setup, labels: Labels, columns: Columns) -> dict[str, Any]:
    """Measure loss and accuracy of each class, held out and in training."""
    if setup.recipe.objective.loss not in CLASS_LOSSES or setup.data.targets is None:
        return {"why": f"the loss {setup.recipe.objective.loss} has no classes."}
    ids = setup.splits.held_out
    if len(ids) > HELD_OUT:
        ids = ids[Order(len(ids), batch_size=HELD_OUT).indices(0)]
    data = setup.data.select(ids)

    def losses_of(batch: Any, size: int) -> ExampleLosses:
        with autocast(setup.recipe.run.precision, find_device(setup.model)):
            return next(iter(setup.objective.losses(setup.model, batch, size).values()))

    terms = list(map_micro_batches(setup.model, losses_of, data.columns, collate=data.collate))
    loss = torch.cat([term.means for term in terms]).double().cpu()
    hits = torch.cat([term.metrics["accuracy"] / term.weights for term in terms]).double().cpu()
    targets = setup.data.targets[ids].cpu()
    num = int(setup.data.targets.max()) + 1
    count = torch.bincount(targets, minlength=num)
    return {
        "held_out": len(ids),
        "of": len(setup.splits.held_out),
        "names": labels.name_classes(torch.arange(num)),
        "count": count.tolist(),
        "loss": (torch.bincount(targets, loss, num) / count).tolist(),
        "accuracy": (torch.bincount(targets, hits, num) / count).tolist(),
        "over_training": _measure_over_training(setup, columns, num),
    }


def _measure_over_training(setup: Setup, columns: Columns, num: int) -> dict[str, Any] | None:
    """Measure the accuracy of each class at the visits of each epoch: [epochs, classes]."""
    if columns is None or "accuracy" not in columns or setup.data.targets is None:
        return None
    epochs = np.unique(columns["epoch"])
    of = setup.data.targets.cpu().numpy()[columns["example"]]
    place = np.searchsorted(epochs, columns["epoch"]) * num + of
    size = len(epochs) * num
    visits = np.bincount(place, minlength=size)
    hits = np.bincount(place, columns["accuracy"], size)
    with np.errstate(invalid="ignore"):
        rates = np.where(visits, hits / np.maximum(visits, 1), np.nan)
    return {"epochs": epochs.tolist(), "accuracy": pack(rates.reshape(len(epochs), num))}
