"""A run as a whole: its curves, the examples that drove it, its classes and its checkpoints.

A curve of more than a few thousand updates is shown by means over consecutive ones; the page says
how many. The data loss is the sum of all parts of the loss that are no penalty.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.batch import get_inputs
from anybatch.errors import AnybatchError
from anybatch.example_losses import ExampleLosses
from anybatch.order import Order
from anybatch.precision import autocast
from anybatch.pytree import prepare_batch
from anybatch.recipe.build import CLASS_LOSSES, Setup
from anybatch.recipe.results import verify_run
from anybatch.report.default_step import Rows, data_loss
from anybatch.report.examples import Labels
from anybatch.report.packing import packed
from anybatch.report.pictures import pictures
from anybatch.report.replay import batch_of_ids
from anybatch.training.batches import num_examples
from anybatch.training.evaluation import device_of, outputs
from anybatch.training.examples import By, ranked
from anybatch.training.ledger import read_ledger

__all__ = ["Columns", "Rows", "history", "ledger_of"]

Columns = Mapping[str, NDArray[Any]] | None

POINTS = 4000  # of a curve, at most
DRIVERS = 12  # examples of each ranking
HELD_OUT = 2000  # held-out examples that classes are judged by, at most


def history(
    folder: Path, setup: Setup, labels: Labels, rows: Rows, ledger: tuple[Columns, str]
) -> dict[str, Any]:
    """Gather what a page shows of a whole run.

    Args:
        folder, built: the run.
        labels: names of its classes.
        rows: its records.
        ledger: from `ledger_of`.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    columns, why = ledger
    penalties = [part.part for part in setup.objective.penalty or ()]
    found: dict[str, Any] = {"curves": _curves(steps, penalties) if steps else None}
    found["evaluations"] = [
        {
            "step": row["step"],
            "split": row["split"],
            "data_loss": data_loss(row["parts"], penalties),
            **row["metrics"],
        }
        for row in rows
        if row["kind"] == "evaluation"
    ]
    found["stopped"] = next((row["reason"] for row in rows if row["kind"] == "stop"), None)
    found["drivers"] = {"why": why} if columns is None else _drivers(columns, setup, labels)
    found["classes"] = _classes(setup, labels, columns)
    found["checkpoints"] = verify_run(folder)["checkpoints"]
    return found


def ledger_of(folder: Path, setup: Setup) -> tuple[Columns, str]:
    """Read the ledger of a run as columns; None and the reason if there is none of these data."""
    try:
        columns = read_ledger(folder)
    except AnybatchError as error:
        return None, str(error)
    ids, total = columns["example"], num_examples(setup.data.columns)
    if len(ids) and not (ids.min() >= 0 and ids.max() < total):
        return None, f"the ledger names examples other than 0 to {total - 1}, which the data have."
    return columns, ""


def _curves(steps: Rows, penalties: Sequence[str]) -> dict[str, Any]:
    """Gather every number that updates have, over the steps."""
    width = -(-len(steps) // POINTS)
    names = ("step", "lr", "seconds")
    found = {name: _means([row[name] for row in steps], width) for name in names}
    nested = {
        kind: {
            name: _means([row.get(kind, {}).get(name) for row in steps], width)
            for name in dict.fromkeys(name for row in steps for name in row.get(kind, {}))
        }
        for kind in ("parts", "averages", "metrics")
    }
    for numbers, kind in ((found, "parts"), (nested["averages"], "averages")):
        losses = [
            data_loss({name: row[kind][name] for name in row["parts"]}, penalties)
            if kind in row
            else None
            for row in steps
        ]
        numbers["data_loss"] = _means(losses, width)
    skipped = [row["step"] for row in steps if row.get("skipped")]
    return {"updates_a_point": width, "skipped": skipped, **found, **nested}


def _means(values: Sequence[float | None], width: int) -> dict[str, Any]:
    """Average `width` consecutive values each; null counts as missing."""
    array = np.array([np.nan if value is None else value for value in values], np.float64)
    missing = -len(array) % width
    whole = np.concatenate([array, np.full(missing, np.nan)]).reshape(-1, width)
    known = ~np.isnan(whole)
    sums = np.where(known, whole, 0).sum(1)
    return packed(np.where(known.any(1), sums / np.maximum(known.sum(1), 1), np.nan))


def _drivers(columns: Mapping[str, NDArray[Any]], setup: Setup, labels: Labels) -> dict[str, Any]:
    """Rank the examples by their means over all visits, with their pictures."""
    by: tuple[By, ...] = ("norm", "loss", "share", "forgetting")
    lists: dict[str, Any] = {}
    for key in by:
        try:
            lists[key] = ranked(columns, key, DRIVERS)
        except AnybatchError as error:
            lists[key] = {"why": str(error)}
    rankings = [rows for rows in lists.values() if isinstance(rows, list)]
    ids = sorted({row["example"] for rows in rankings for row in rows})
    targets = setup.data.targets
    batch = batch_of_ids(setup, torch.tensor(ids))
    return {
        "lists": lists,
        "ids": ids,
        "pictures": pictures(get_inputs(prepare_batch(batch)), labels),
        "labels": labels.of(_classes_of(setup, targets, ids)),
    }


def _classes_of(setup: Setup, targets: torch.Tensor | None, ids: Sequence[int]) -> Any:
    is_class = setup.recipe.objective.loss in CLASS_LOSSES and targets is not None
    return targets[torch.tensor(ids)] if is_class and targets is not None else None


def _classes(setup: Setup, labels: Labels, columns: Columns) -> dict[str, Any]:
    """Measure loss and accuracy of each class, held out and in training."""
    if setup.recipe.objective.loss not in CLASS_LOSSES or setup.data.targets is None:
        return {"why": f"the loss {setup.recipe.objective.loss} has no classes."}
    ids = setup.splits.held_out
    if len(ids) > HELD_OUT:
        ids = ids[Order(len(ids), batch_size=HELD_OUT).indices(0)]
    data = setup.data.of_ids(ids)

    def losses_of(batch: Any, size: int) -> ExampleLosses:
        with autocast(setup.recipe.run.precision, device_of(setup.model)):
            return next(iter(setup.objective.losses(setup.model, batch, size).values()))

    terms = list(outputs(setup.model, losses_of, data.columns, collate=data.collate))
    loss = torch.cat([term.means for term in terms]).double().cpu()
    hits = torch.cat([term.metrics["accuracy"] / term.weights for term in terms]).double().cpu()
    targets = setup.data.targets[ids].cpu()
    num = int(setup.data.targets.max()) + 1
    count = torch.bincount(targets, minlength=num)
    return {
        "held_out": len(ids),
        "of": len(setup.splits.held_out),
        "names": labels.of(torch.arange(num)),
        "count": count.tolist(),
        "loss": (torch.bincount(targets, loss, num) / count).tolist(),
        "accuracy": (torch.bincount(targets, hits, num) / count).tolist(),
        "over_training": _over_training(setup, columns, num),
    }


def _over_training(setup: Setup, columns: Columns, num: int) -> dict[str, Any] | None:
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
    return {"epochs": epochs.tolist(), "accuracy": packed(rates.reshape(len(epochs), num))}
