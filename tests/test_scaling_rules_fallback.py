"""benchmarks/scaling_rules.py on digits, where Fashion-MNIST's files are missing.

The oracles: scikit-learn's digits as they come, NumPy on the raw result, the other document.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anybatch.errors import DataError
from rules_modules import Modules, forget

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
RAW = json.loads((RESULTS / "scaling_rules_digits.json").read_text())
TEXT = (DOCS / "scaling-rules-digits.md").read_text(encoding="utf8")
WORDS = TEXT.replace("\n", " ")
FULL = 1438


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Modules]]:
    """The modules of the benchmark on some data."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def chosen(data: str) -> Modules:
        forget()
        monkeypatch.setenv("SCALING_RULES_DATA", data)
        return Modules()

    yield chosen
    forget()


def told(monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[list[str], str]:
    """What the command starts anew, of the arguments that it was given, and on which data."""
    asked: list[Any] = []

    def instead(path: str, argv: list[str], environment: dict[str, str]) -> None:
        asked.extend((argv[2:], environment["SCALING_RULES_DATA"]))
        raise SystemExit("begun anew")

    monkeypatch.setattr(os, "execve", instead)
    monkeypatch.setattr(sys, "argv", ["scaling_rules.py", *args])
    with pytest.raises(SystemExit, match="begun anew"):
        import_module("scaling_rules").main()
    return asked[0], asked[1]


def test_without_the_files_the_runs_are_on_digits_and_it_says_so(
    of: Callable[[str], Modules],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    available = of("fashion_mnist").data.available
    monkeypatch.setattr(available, "__defaults__", (str(tmp_path),))
    assert told(monkeypatch, "--write") == (["--write", "--data", "digits"], "digits")
    said = capsys.readouterr().out
    assert f"Fashion-MNIST is not in {tmp_path} (apt install dataset-fashion-mnist)" in said
    assert "without the batch sizes above 1,438" in said
    assert told(monkeypatch, "--data", "digits")[1] == "digits"
    assert capsys.readouterr().out == ""  # asked for: nothing to say
    (tmp_path / "train-images-idx3-ubyte.gz").touch()  # control: they are there, but not all
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz is not there"):
        available()


def test_the_images_are_all_digits_once(of: Callable[[str], Modules]) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = of("digits").data
    parts = [data.loaded(part) for part in ("train", "test")]
    assert [len(classes) for _, classes in parts] == [FULL, data.DATA.held_out_examples]
    found = np.concatenate([images.flatten(1).numpy() for images, _ in parts])
    wanted = datasets.load_digits().data / 16
    assert sorted(found.round(4).tolist()) == sorted(wanted.round(4).tolist())
    # the constants have three decimals
    assert (data.DATA.mean, data.DATA.deviation) == pytest.approx(
        (wanted.mean(), wanted.std()), abs=5e-4
    )


def sizes_of(parts: Any) -> set[int]:
    """Of every batch of every job."""
    raw = (
        RAW
        if parts.common.FULL == FULL
        else json.loads((RESULTS / "scaling_rules.json").read_text())
    )
    modules = import_module("scaling_rules").PARTS.values()
    jobs = [job for module in modules for job in module.jobs(raw)]
    return {job["size"] for job in jobs if "size" in job}


def test_sizes_above_the_set_are_left_out(of: Callable[[str], Modules]) -> None:
    digits = sizes_of(of("digits"))
    fashion = sizes_of(of("fashion_mnist"))  # control
    assert max(digits) == FULL
    assert max(fashion) == 60_000
    assert digits - {FULL} == {size for size in fashion if size < FULL}
    assert {2048, 4096} <= fashion - digits


def test_the_document_and_its_plots_are_what_the_raw_result_gives(
    of: Callable[[str], Modules],
) -> None:
    text = of("digits").document_sections
    assert text.text_from(RAW) == TEXT
    for name, plot in text.plots(RAW).items():
        assert (DOCS / "scaling-rules-digits" / f"{name}.svg").read_text(encoding="utf8") == plot
    changed = json.loads(json.dumps(RAW))  # control
    for run in changed["batches"]["runs"]:
        run["train_loss"] = [loss**2 for loss in run["train_loss"]]
    assert text.text_from(changed) != TEXT
    with pytest.raises(AssertionError, match="of fashion_mnist, and the data are digits"):
        text.text_from({**RAW, "data": "fashion_mnist"})


def test_the_document_says_what_it_is_on_and_what_is_missing() -> None:
    assert TEXT.startswith("# Rules for another batch size, measured on digits\n")
    assert "scikit-learn's digits, and not Fashion-MNIST" in WORDS
    missing = "4,096 in sections 1, 2, 3; 2,048 in section 8"
    assert f"Batches larger than the 1,438 to train on are missing: {missing}." in WORDS
    figures = TEXT.partition("\n## 1.")[2]
    assert not re.search(r"60,000 (images|examples)|\b10,000\b|B = 2,048|batches of 512", figures)
    assert re.findall(r"^\| SGD, tuned rate: distance at \| (.*) \|$", TEXT, re.M) == [
        "256 | 1,024 | 1,438"
    ]
    other = (DOCS / "scaling-rules.md").read_text(encoding="utf8")
    assert "digits" not in other  # control
    assert "are missing" not in other


def test_the_other_document_is_as_it_was(of: Callable[[str], Modules], tmp_path: Path) -> None:
    names = {}
    for data in ("fashion_mnist", "digits"):
        parts = of(data)
        text, result = parts.document_sections, parts.data.DATA.result
        text.DOCUMENT, text.PLOTS = tmp_path / text.DOCUMENT.name, tmp_path / text.PLOTS.name
        text.publish(json.loads((RESULTS / f"{result}.json").read_text()))
        names[data] = (result, text.DOCUMENT.name, text.PLOTS.name)
    assert not set(names["digits"]) & set(names["fashion_mnist"])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2 * 6
    for path in written:  # the first after the second had been written
        assert path.read_bytes() == (DOCS / path.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize("study", ["sgd", "smaller", "adamw"])
def test_each_verdict_on_a_rule_follows_from_the_losses(
    of: Callable[[str], Modules], study: str
) -> None:
    parts = of("digits")
    optimizer, title = parts.document_carried.STUDIES[study]
    curves: dict[Any, list[Any]] = {}
    for run in RAW["smaller" if study == "smaller" else "batches"]["runs"]:
        if run["optimizer"] == optimizer and run["seed"] < 5:
            curves.setdefault((run["rule"], run["size"]), []).append(run["train_loss"])
    table = TEXT.split(f"| {title}: distance at |")[1].split("![")[0]
    reference = np.log(np.mean(curves.pop((None, 32)), axis=0))
    for (rule, size), losses in curves.items():
        row = re.search(rf"^\| {re.escape(rule)} \| (.*) \|$", table, re.M)
        assert row is not None
        cell = row[1].split(" | ")[parts.batches.SIZES.index(size)]
        if min(map(len, losses)) < len(reference):
            assert cell == "diverges"
            continue
        found = np.abs(np.log(np.mean(losses, axis=0)) - reference)[1:].mean()
        assert cell == f"{found:.2f} {'holds' if found <= 0.10 else 'breaks'}"


def test_the_raw_result_has_the_jobs_and_the_minutes_of_the_protocol(
    of: Callable[[str], Modules],
) -> None:
    of("digits")
    for name, module in import_module("scaling_rules").PARTS.items():
        asked, made = module.jobs(RAW), RAW[name]["runs"]
        found = [{key: run[key] for key in job} for job, run in zip(asked, made, strict=True)]
        assert found == asked
    parts = [RAW[name] for name in import_module("scaling_rules").PARTS]
    for kind in ("cpu", "wall"):  # one decimal
        wanted = sum(part[f"{kind}_seconds"] for part in parts) / 60
        assert RAW["minutes"][kind] == pytest.approx(wanted, abs=0.051)


def test_a_run_gives_what_the_raw_result_has(of: Callable[[str], Modules]) -> None:
    parts = of("digits")
    jobs = list(zip(parts.smaller.jobs(RAW), RAW["smaller"]["runs"], strict=True))
    job, found = next(pair for pair in jobs if pair[0]["rule"] == "none")
    again = parts.smaller.run(**{**job, "size": FULL})
    kept = next(r for _, r in jobs if (r["rule"], r["size"], r["seed"]) == ("none", FULL, 0))
    # another processor rounds otherwise, and five figures are kept
    assert again["train_loss"] == pytest.approx(kept["train_loss"], rel=1e-3)
    assert again["train_loss"] != pytest.approx(found["train_loss"], rel=1e-2)  # control: at 256


def test_a_target_that_is_not_reached_is_no_gap(of: Callable[[str], Modules]) -> None:
    gaps = of("digits").document_gaps
    changed = json.loads(json.dumps(RAW))
    run = next(r for r in changed["gap"]["runs"] if r["size"] == 256)
    for key in ("train_loss", "test_loss", "train_error", "test_error"):
        run.pop(key)
    run["updates"] = None
    (row,) = [line for line in gaps.by_size(changed) if line.startswith("| 256 |")]
    assert "| reached by 2 of 3 |" in row
    assert " at 256 " not in gaps.extremes(changed)
    for other in changed["gap"]["runs"]:
        other["updates"] = None if other["size"] != 32 else other["updates"]
    assert gaps.extremes(changed) == "not compared, since fewer than two sizes reach it"


def test_a_loss_met_in_the_first_epoch_is_not_said_to_be_missed(
    of: Callable[[str], Modules],
) -> None:
    gaps = of("digits").document_gaps
    metrics = {"train_error": [0.2, 0.1], "test_error": [0.3, 0.2], "test_loss": [0.5, 0.4]}
    early, later, never = (
        {**metrics, "train_loss": losses} for losses in ([0.1, 0.05], [0.4, 0.1], [0.4, 0.3])
    )
    assert gaps._gap([early, later], 0.2) == "in the first epoch by 1 of 2, later by 1"
    assert gaps._gap([later, never], 0.2) == "reached by 1 of 2"
    assert gaps._gap([never, never], 0.2) == "not reached"


def test_an_interval_without_an_end_begins_where_the_difference_is_t_standard_errors(
    of: Callable[[str], Modules],
) -> None:
    parts = of("digits")
    rng = np.random.default_rng(0)
    above, below = rng.normal(5.0, 0.5, 40), rng.normal(0.0, 1.0, 40)
    below += 0.1 - below.mean()  # which is not told from 0
    low, high = parts.noise.fieller(above.tolist(), below.tolist(), 2.0)
    assert high == math.inf

    def errors(ratio: float) -> float:
        difference = above - ratio * below
        return float(abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(40)))

    assert errors(low) == pytest.approx(2.0, rel=1e-9)
    assert errors(0.9 * low) > 2.0 > errors(1.1 * low)
    assert parts.document_noise._interval([-7.0, 3.0, None]) == "unresolved (3 and more)"
    assert parts.document_noise._interval([7.0, 3.0, 9.0]) == "7 (3 to 9)"
    assert not parts.document_noise._holds([7.0, 3.0, 9.0], -7.0)
    assert parts.document_noise._holds([-7.0, 3.0, None], -7.0)
