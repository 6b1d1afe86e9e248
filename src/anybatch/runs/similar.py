"""Examples of a run whose gradients point the same way as one's, from random projections.

    s_i  =  sum_t eta_t cos(S g_i(t), S g(t'))  /  sum_t eta_t

t runs over the visits of example i, and t' is the visit of the one example in the same epoch. g is
the gradient of the example's own loss, S its projection, and eta_t the learning rate. The two
visits have about the same weights, not exactly.

Sources: TracIn (Pruthi et al. 2020, 2002.08484) sums eta_t <g_i, g> over checkpoints; LESS (Xia et
al. 2024, 2402.04333) takes cosines of projections, as here.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybatch.errors import RunError
from anybatch.runs.ledger_files import PROJECTION, average_visits, iterate_projections, read_ledger
from anybatch.runs.records import read_records

__all__ = ["compute_cosines", "export_projections", "rank_similar", "select_ends"]

_EXPORTED = ("step", "epoch", "example", PROJECTION)


def rank_similar(run: Path, example: int, top: int) -> dict[str, list[dict[str, Any]]]:
    """Rank the examples of a run by the cosine of their gradients with those of one of them.

    Returns:
        "aligned" and "opposed": at most `top` examples each, with cosine, visits and means.

    Raises:
        RunError: the run has no projections, or has not visited the example.
    """
    directions = _find_directions(run, example)
    rates = _read_rates(run)
    sums: dict[str, list[NDArray[Any]]] = {"example": [], "weight": [], "cosine": []}
    for rows in iterate_projections(run):
        rows = _select(rows, np.isin(rows["epoch"], list(directions)))
        weight = np.array([rates.get(step, 1.0) for step in rows["step"].tolist()])
        others = np.array([directions[epoch] for epoch in rows["epoch"].tolist()])
        if len(weight):
            sums["example"].append(rows["example"])
            sums["weight"].append(weight)
            sums["cosine"].append(np.einsum("nk,nk->n", _normalize(rows[PROJECTION]), others))
    ids, weight, cosine = (np.concatenate(sums[name]) for name in sums)
    weight = weight if weight.any() else np.ones_like(weight)
    ids, place = np.unique(ids, return_inverse=True)
    totals = np.bincount(place, weight)
    means = np.bincount(place, weight * cosine) / np.where(totals > 0, totals, 1)
    table = average_visits(read_ledger(run))
    figures = {name: column[np.isin(table["example"], ids)] for name, column in table.items()}
    columns = {"example": figures.pop("example"), "cosine": means} | figures
    return select_ends(_select(columns, ids != example), top)


def select_ends(columns: dict[str, NDArray[Any]], top: int) -> dict[str, list[dict[str, Any]]]:
    """Select the rows with the largest cosines above 0, and with the smallest below 0."""
    order = np.argsort(-columns["cosine"], kind="stable")
    rows = [{name: column[i].item() for name, column in columns.items()} for i in order]
    return {
        "aligned": [row for row in rows[:top] if row["cosine"] > 0],
        "opposed": [row for row in rows[: -top - 1 : -1] if row["cosine"] < 0],
    }


def compute_cosines(rows: NDArray[Any], one: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the cosine of each row [n, k] with one [k]; 0 where a length is 0 or not finite."""
    cosines: NDArray[np.float64] = _normalize(rows) @ _normalize(one[None])[0]
    return cosines


def export_projections(run: Path) -> tuple[bytes, int]:
    """Pack the projections of a run as a NumPy archive; return it and its number of rows.

    Arrays: step, epoch, example, learning_rate [n], and projection [n, k] in float32. A rate that
    the records lack is nan.
    """
    files = list(iterate_projections(run))
    arrays: dict[str, Any] = {}
    arrays |= {name: np.concatenate([rows[name] for rows in files]) for name in _EXPORTED}
    rates = _read_rates(run)
    arrays["learning_rate"] = np.array([rates.get(t, np.nan) for t in arrays["step"].tolist()])
    out = BytesIO()
    np.savez(out, **arrays)
    return out.getvalue(), len(arrays["step"])


def _find_directions(run: Path, example: int) -> dict[int, NDArray[Any]]:
    """Find the mean direction of an example's projections in each epoch."""
    visits: dict[int, list[NDArray[Any]]] = {}
    for rows in iterate_projections(run):
        visit = _select(rows, rows["example"] == example)
        for epoch, direction in zip(
            visit["epoch"].tolist(), _normalize(visit[PROJECTION]), strict=True
        ):
            visits.setdefault(epoch, []).append(direction)
    if not visits:
        raise RunError(
            f"The ledger of {run} has no example {example}. Expected the id of an example that "
            f"was trained on; 'anybatch examples {run}' lists some. For an example that was held "
            f"out, use --similar-held-out {example}."
        )
    return {epoch: np.mean(directions, 0) for epoch, directions in visits.items()}


def _select(columns: dict[str, NDArray[Any]], mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    return {name: column[mask] for name, column in columns.items()}


def _normalize(rows: NDArray[Any]) -> NDArray[Any]:
    """Divide rows [n, k] by their lengths; those of no finite length above 0 become zeros."""
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    has_length = np.isfinite(lengths) & (lengths > 0)
    np.divide(wide, lengths, out=wide, where=has_length)
    wide[~has_length[:, 0]] = 0
    return wide


def _read_rates(run: Path) -> dict[int, float]:
    """Read the learning rates of a run from its records, by step."""
    rows = read_records(run / "records.jsonl")
    steps = (row for row in rows if row["kind"] == "step")
    return {row["step"]: row["lr"] for row in steps if row.get("lr") is not None}
