"""docs/scaling-rules.md and docs/scaling-rules-digits.md against their raw results, by NumPy."""

import json
import math
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rules_modules import DOCS, NAMES, Modules, load_modules, read_document, read_result

__all__ = ["load_modules"]

RAW = {data: read_result(data) for data in NAMES}
WORDS = {data: " ".join(read_document(data).split()) for data in NAMES}
STUDIES = {"sgd": "SGD, tuned rate", "smaller": "SGD, a quarter of it", "adamw": "AdamW"}
both = pytest.mark.parametrize("data", NAMES)


def mean_curves(raw: Any, study: str) -> dict[tuple[str, int], Any]:
    """Return ln of the training loss by rule and size; None where a training diverged.

    The rules of the reference are "" and "again".
    """
    runs = raw["smaller" if study == "smaller" else "batches"]["runs"]
    losses: dict[tuple[str, int], list[Any]] = {}
    for run in runs:
        if run["optimizer"] == ("adamw" if study == "adamw" else "sgd"):
            rule = "again" if run["seed"] >= 5 else run["rule"] or ""
            losses.setdefault((rule, run["size"]), []).append(run["train_loss"])
    return {
        cell: np.log(np.mean(curves, axis=0)) if {*map(len, curves)} == {10} else None
        for cell, curves in losses.items()
    }


def distances(raw: Any, study: str) -> dict[tuple[str, int], float]:
    """Return the distance from the reference by rule and size."""
    curves = mean_curves(raw, study)
    reference = curves.pop(("", 32))
    return {
        cell: math.inf if curve is None else float(np.abs(curve - reference)[1:].mean())
        for cell, curve in curves.items()
    }


def rules_that_hold(raw: Any, study: str) -> dict[int, list[str]]:
    """Return the rules with a distance of at most 0.10, by size."""
    rules: dict[int, list[str]] = {}
    for (rule, size), distance in distances(raw, study).items():
        if rule != "again" and distance <= 0.10:
            rules.setdefault(size, []).append(rule)
    return rules


def closest_rules(raw: Any, study: str) -> list[str]:
    """Return the rule with the smallest distance at each size, ascending."""
    cells = distances(raw, study)
    sizes = sorted({size for _, size in cells if size != 32})
    return [
        min((r for r, s in cells if s == size), key=lambda r, s=size: cells[r, s]) for size in sizes
    ]


@both
def test_tables_and_plots_are_those_of_the_raw_result(
    load_modules: Callable[[str], Modules], data: str
) -> None:
    modules = load_modules(data)
    document = modules.document.DOCUMENT.read_text(encoding="utf8")
    assert document == read_document(data)
    fill = import_module("tables").fill_tables
    tables, plots = modules.tables.format_tables(RAW[data]), modules.document.draw_plots(RAW[data])
    assert fill(document, tables) == document
    folder = modules.document.DOCUMENT.with_suffix("")
    for name, svg in plots.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf8") == svg
    changed = json.loads(json.dumps(RAW[data]))  # control
    for run in changed["batches"]["runs"]:
        if run["rule"] == "linear":
            run["train_loss"] = [2 * loss for loss in run["train_loss"]]
    assert fill(document, modules.tables.format_tables(changed)) != document
    assert plots["sgd"] != modules.document.draw_plots(changed)["sgd"]
    with pytest.raises(AssertionError, match="the raw result is of other; "):
        modules.document.publish(RAW[data] | {"data": "other"})
    with pytest.raises(ValueError, match=r"The document has the tables \['machine', .* Expected"):
        fill(document, {**tables, "another": ""})


@both
def test_the_raw_result_is_of_the_protocol(
    load_modules: Callable[[str], Modules], data: str
) -> None:
    modules = load_modules(data)
    parts = import_module("scaling_rules").PARTS
    for name, part in parts.items():
        jobs = part.list_jobs(RAW[data])
        runs = [
            {key: run[key] for key in job}
            for job, run in zip(jobs, RAW[data][name]["runs"], strict=True)
        ]
        assert runs == jobs
    assert modules.batches.list_jobs(RAW[data]) != modules.warmup.list_jobs(RAW[data])  # control


@both
@pytest.mark.parametrize("study", STUDIES)
def test_each_verdict_on_a_rule_follows_from_the_losses(data: str, study: str) -> None:
    cells = distances(RAW[data], study)
    again = cells.pop(("again", 32))
    table = read_document(data).split(f"<!-- table: distance-{study} -->")[1].split("<!--")[0]
    heads, rows = table.splitlines()[1], table.splitlines()[3:]
    sizes = [int(head.replace(",", "")) for head in heads.strip("| ").split(" | ")[1:]]
    assert rows.pop().startswith(f"| reference, other seeds, at 32 | {again:.3f} |")
    verdicts = {}
    for row in rows:
        rule, *texts = row.strip("| ").split(" | ")
        verdicts.update({(rule, size): text for size, text in zip(sizes, texts, strict=True)})
    assert verdicts == {
        cell: f"{value:.2f} {'holds' if value <= 0.10 else 'breaks'}"
        if math.isfinite(value)
        else "diverges"
        for cell, value in cells.items()
    }


def test_the_sentences_on_rules_follow_from_the_losses() -> None:
    raw, digits = RAW["fashion_mnist"], RAW["digits"]
    assert rules_that_hold(raw, "sgd") == {256: ["linear", "square root"]}
    assert "*linear* and *square root* hold at 256. Above that no rule" in WORDS["fashion_mnist"]
    assert rules_that_hold(raw, "smaller") == {256: ["linear", "half-life"], 1024: ["linear"]}
    sentence = "*linear* and *half-life* hold at 256, and *linear* at 1,024. Above that no rule"
    assert sentence in WORDS["fashion_mnist"]
    adamw = rules_that_hold(raw, "adamw")
    assert len(adamw.pop(256)) == 4
    assert adamw == {1024: ["rate k, decay as it is"]}
    assert (
        "every rule holds except *rate as it is, decay k*. At 1,024 only *rate k, decay as"
        in (WORDS["fashion_mnist"])
    )
    for study, title in STUDIES.items():
        assert rules_that_hold(digits, study) == {}
        assert f"**{title}**: no rule holds at any size." in WORDS["digits"]
    closest = {data: [closest_rules(RAW[data], study) for study in STUDIES] for data in NAMES}
    square, same = "rate sqrt(k), decay as it is", "rate as it is, decay as it is"
    assert closest == {
        "fashion_mnist": [
            ["square root"] * 3 + ["none"],
            ["linear"] * 2 + ["square root"] * 2,
            [square, "rate k, decay as it is", square, same],
        ],
        "digits": [
            ["square root"] * 3,
            ["half-life", "linear", "linear"],
            ["rate k, decay as it is", square, square],
        ],
    }
    assert "*square root* is the closest rule up to 4,096, and *none* at" in WORDS["fashion_mnist"]
    assert "*half-life* is the closest rule at 256, and *linear* above." in WORDS["digits"]
    assert distances(digits, "sgd")["again", 32] > 0.10
    assert f"the reference is {distances(digits, 'sgd')['again', 32]:.3f} from" in WORDS["digits"]


@both
def test_the_sentences_on_rates_follow_from_the_losses(data: str) -> None:
    best = {}
    for optimizer in ("sgd", "adamw"):
        runs = [run for run in RAW[data]["rates"]["runs"] if run["optimizer"] == optimizer]
        losses = {run["lr"]: np.mean(run["train_loss"][-3:]) for run in runs}
        best[optimizer] = min(losses, key=lambda lr: losses[lr])
        assert min(losses) < best[optimizer] < max(losses)
        if optimizer == "sgd":
            for lr in [lr for lr in losses if lr >= best["sgd"]]:
                assert f"{losses[lr]:.3f} at {lr:g}" in WORDS[data]
    assert f"This is {best['sgd']:g} for SGD" in WORDS[data]
    assert f"and {best['adamw']:g} for AdamW" in WORDS[data]
    updates: dict[int, dict[float, float]] = {}
    for run in RAW[data]["tuning"]["runs"]:
        updates.setdefault(run["size"], {})[run["lr"]] = run["updates"] or math.inf
    tuned = {size: min(rates, key=lambda lr: rates[lr]) for size, rates in updates.items()}
    assert all(min(rates) < tuned[size] < max(rates) for size, rates in updates.items())
    assert "No tuned rate is at an end of its grid." in WORDS[data]
    linear = [size for size, rate in tuned.items() if rate == size * tuned[1]]
    constant = [size for size, rate in tuned.items() if rate == list(tuned.values())[-1]]
    sentence = (
        f"in proportion to the batch up to {linear[-1]}, and is constant from {constant[0]} on"
    )
    assert sentence in WORDS[data]
    for run in RAW[data]["steps"]["runs"]:
        assert run["lr"] == tuned[run["size"]]
        assert run["seed"] != 100  # the seed of tuning


@both
def test_the_sentences_on_gaps_and_warm_ups_follow_from_the_losses(data: str) -> None:
    gaps: dict[int, list[float]] = {}
    for run in RAW[data]["gap"]["runs"]:
        gaps.setdefault(run["size"], []).append(run["test_loss"] - run["train_loss"])
    low, *_, high = sorted(gaps, key=lambda size: np.mean(gaps[size]))
    assert (
        f"smallest at {low:,} ({np.mean(gaps[low]):.3f}), "
        f"largest at {high:,} ({np.mean(gaps[high]):.3f})" in WORDS[data]
    )
    ends: dict[tuple[str, int], list[float]] = {}
    for run in RAW[data]["warmup"]["runs"]:
        ends.setdefault((run["arm"], run["size"]), []).append(run["train_loss"][-1])
    reference = np.mean(ends.pop(("reference", 32)))
    assert all(abs(math.log(np.mean(losses) / reference)) > 0.10 for losses in ends.values())
    assert f"none of the {len(ends)} large batches matches the small batch" in WORDS[data]
    lowest = {}
    for size in {size for _, size in ends}:
        arms = [arm for arm, s in ends if s == size]
        lowest[size] = min(arms, key=lambda arm, s=size: np.mean(ends[arm, s]))
    assert lowest == (
        {1024: "gradual", 4096: "square root"} if data != "digits" else {1024: "square root"}
    )
    assert f"At 1,024 *{lowest[1024]}* has the lowest training loss" in WORDS[data]


def test_the_counts_of_gaps_follow_from_the_tables() -> None:
    for data in NAMES:
        counts = []
        for study in STUDIES:
            table = read_document(data).split(f"<!-- table: gap-{study} -->")[1].split("<!--")[0]
            *rows, last = [re.findall(r"(\d\.\d{3}) ±", row) for row in table.splitlines()[3:]]
            gaps = [float(gap) for row in rows for gap in row]
            counts.append((sum(gap >= float(last[0]) for gap in gaps), len(gaps)))
        (a, b), (c, d), (e, f) = counts
        assert f"{a} of {b}, {c} of {d} and {e} of {f} have a larger gap" in WORDS[data]


@both
def test_the_sentences_on_norms_and_worst_losses_follow_from_the_runs(data: str) -> None:
    curves = {
        (r["reduction"], r["size"], r["seed"]): np.array(r["norms"])
        for r in RAW[data]["norms"]["runs"]
    }
    off = max(
        np.abs(curve - curves["mean", size, seed]).max()
        for (reduction, size, seed), curve in curves.items()
        if reduction == "sum at lr / B"
    )
    assert off <= 1.01e-3  # of one seed; |w| has four or five figures
    losses: dict[tuple[str, str, float], list[Any]] = {}
    for run in RAW[data]["worst"]["runs"]:
        if run["train"] is not None:
            key = (run["model"], run["reduction"], run["lr"])
            losses.setdefault(key, []).append(run)
    lower = []
    for model in ("linear", "network"):
        best = {}
        for reduction in ("mean", "max"):
            cells = [key for key in losses if key[:2] == (model, reduction)]
            score = {k: np.mean([run["train"][reduction] for run in losses[k]]) for k in cells}
            best[reduction] = losses[min(score, key=lambda k: score[k])]
        for part in ("train", "test"):
            for loss in ("mean", "max"):
                means = {r: np.mean([run[part][loss] for run in runs]) for r, runs in best.items()}
                lower.append(min(means, key=lambda r: means[r]))
    if data == "fashion_mnist":
        assert lower == ["mean", "max"] * 4
        sentence = "On both models, in training and held out, Mean has the lower mean loss and Max"
    else:
        assert lower == ["max", "max", "mean", "mean", "mean", "mean", "max", "max"]
        sentence = (
            "In training, Max has the lower mean and worst loss on the linear model, and Mean"
        )
    assert sentence in WORDS[data]


@both
def test_the_sentences_on_escapes_follow_from_the_runs(
    load_modules: Callable[[str], Modules], data: str
) -> None:
    minima = load_modules(data).minima
    inside = 0
    for run in RAW[data]["minima"]["runs"]:
        if (run["size"], run["optimiser"]) == (256, "SGD"):
            expected = minima.predict_escapes(run["start"], run["penalty"])
            error = math.sqrt(expected * (1 - expected) / 400)
            inside += abs(run["below"] - expected) <= 3 * error + 1e-9
    assert f"within three standard errors of the prediction in {inside} of 9 columns" in WORDS[data]
    leaving = {
        (run["optimiser"], run["size"]): f"{100 * run['below']:.0f} %"
        for run in RAW[data]["minima"]["runs"]
        if (run["penalty"], run["start"]) == (0.0, "local minimum") and run["below"] > 0
    }
    assert leaving == {("SGD", 1): "98 %", ("momentum", 1): "98 %"}
    assert "SGD (98 %) and momentum (98 %) on single examples" in WORDS[data]


@both
def test_the_sentences_on_noise_and_steps_follow_from_the_runs(data: str) -> None:
    runs = [r["points"] for r in RAW[data]["noise"]["runs"] if r["what"] == "three ways"]
    intervals = [
        (point[way], point["brute force"])
        for points in runs
        for point in points
        for way in ("ledger", "two batches")
    ]
    missed = sum(
        not (low or 0) <= (truth if truth and truth > 0 else math.inf) <= (high or math.inf)
        for (_, low, high), truth in intervals
    )
    assert missed <= 4
    assert f"With {missed} miss{'es' * (missed != 1)} of 30 the three agree." in WORDS[data]
    if data == "digits":
        count = sum(high is None for (_, _, high), _ in intervals)
        assert f"{count} of the 30 intervals have no upper end" in WORDS[data]
    table: dict[int, list[Any]] = {}
    for run in RAW[data]["steps"]["runs"]:
        table.setdefault(run["size"], []).append(run["updates"])
    steps = np.log([np.mean(updates) for updates in table.values()])
    sizes = np.array(list(table))

    def misfit(b_crit: Any) -> Any:
        left = steps - np.log(1 + np.asarray(b_crit)[:, None] / sizes)
        return left - left.mean(1, keepdims=True)

    trials = np.arange(1, 3000, 0.25)  # B_crit by trial
    best = (misfit(trials) ** 2).sum(1).argmin()
    assert np.abs(misfit(trials)[best]).max() <= 0.20
    along = [r["points"] for r in RAW[data]["noise"]["runs"] if r["what"] == "along"]
    variance, square = np.mean(along, axis=0).T
    b_simple = float(np.mean(variance / square))
    assert np.abs(misfit([b_simple])).max() <= 0.20
    assert "Both curves describe the steps." in WORDS[data]
    assert f"B_crit / B_simple is {trials[best] / b_simple:.2f}." in WORDS[data]
    assert f"| {trials[best]:,.0f} |" in read_document(data).split("<!-- table: fit -->")[1]


@both
def test_minutes_are_those_of_the_parts(data: str) -> None:
    parts = [part for part in RAW[data].values() if isinstance(part, dict) and "runs" in part]
    cpu, wall = (sum(part[f"{kind}_seconds"] for part in parts) / 60 for kind in ("cpu", "wall"))
    assert f"| 1 | 2 | {cpu:.0f} | {wall:.0f} |" in read_document(data)
    assert wall < 60
    if data == "digits":  # one decimal
        assert RAW[data]["minutes"] == pytest.approx({"cpu": cpu, "wall": wall}, abs=0.051)


def test_the_document_of_digits_says_what_it_leaves_out() -> None:
    text = read_document("digits")
    assert text.startswith("# Rules for another batch size, measured on digits\n")
    assert "section 8 goes without 2,048, and sections 1, 2 and 3 without 4,096" in WORDS["digits"]
    tables = text.partition("\n## 1.")[2]
    assert not re.search(r"60,000 (images|examples)|\b10,000\b|B = 2,048|batches of 512", tables)
    other = read_document("fashion_mnist")
    assert "digits" not in other  # control
    assert "goes without" not in other


@both
def test_plots_are_xml_with_marks(data: str) -> None:
    folder = DOCS / NAMES[data].replace("_", "-")
    for name in (*STUDIES, "steps"):
        svg = (folder / f"{name}.svg").read_text(encoding="utf8")
        assert ElementTree.fromstring(svg).findall("{*}circle")
