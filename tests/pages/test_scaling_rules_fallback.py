"""benchmarks/scaling_rules.py on digits, where Fashion-MNIST's files are missing.

The oracles: scikit-learn's digits as they come, and the raw result.
"""

import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anybatch.errors import DataError
from rules_modules import DOCS, NAMES, Modules, load_modules, read_result

__all__ = ["load_modules"]

RAW = read_result("digits")
FULL = 1438
Load = Callable[[str], Modules]


def restart_command(monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[list[str], str]:
    """Return the arguments and the data with which the command starts again."""
    restarts: list[Any] = []

    def record(path: str, argv: list[str], environment: dict[str, str]) -> None:
        restarts.extend((argv[2:], environment["SCALING_RULES_DATA"]))
        raise SystemExit("restarted")

    monkeypatch.setattr(os, "execve", record)
    monkeypatch.setattr(sys, "argv", ["scaling_rules.py", *args])
    with pytest.raises(SystemExit, match="restarted"):
        import_module("scaling_rules").main()
    return restarts[0], restarts[1]


def test_without_the_files_the_command_uses_digits_and_says_so(
    load_modules: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_data = load_modules("fashion_mnist").data.find_data
    monkeypatch.setattr(find_data, "__defaults__", (str(tmp_path),))
    assert restart_command(monkeypatch, "--write") == (["--write", "--data", "digits"], "digits")
    message = capsys.readouterr().out
    assert f"Fashion-MNIST is not in {tmp_path} (apt install dataset-fashion-mnist)" in message
    assert "without the batch sizes above 1,438" in message
    assert restart_command(monkeypatch, "--data", "digits")[1] == "digits"
    assert capsys.readouterr().out == ""  # the user asked for digits
    (tmp_path / "train-images-idx3-ubyte.gz").touch()  # control: one of the files is there
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz does not exist"):
        find_data()


def test_the_images_are_all_digits_once(load_modules: Load) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = load_modules("digits").data
    parts = [data.load_images(part) for part in ("train", "test")]
    assert [len(classes) for _, classes in parts] == [FULL, data.DATA.held_out_examples]
    images = np.concatenate([images.flatten(1).numpy() for images, _ in parts])
    expected = datasets.load_digits().data / 16
    assert sorted(images.round(4).tolist()) == sorted(expected.round(4).tolist())
    # the constants have three decimals
    assert (data.DATA.mean, data.DATA.deviation) == pytest.approx(
        (expected.mean(), expected.std()), abs=5e-4
    )


def list_sizes(data: str) -> set[int]:
    """Return the batch sizes of all jobs."""
    modules = import_module("scaling_rules").PARTS.values()
    jobs = [job for module in modules for job in module.list_jobs(read_result(data))]
    return {job["size"] for job in jobs if "size" in job}


def test_sizes_above_the_set_are_left_out(load_modules: Load) -> None:
    load_modules("digits")
    digits = list_sizes("digits")
    load_modules("fashion_mnist")
    fashion = list_sizes("fashion_mnist")  # control
    assert max(digits) == FULL
    assert max(fashion) == 60_000
    assert digits - {FULL} == {size for size in fashion if size < FULL}
    assert {2048, 4096} <= fashion - digits


def test_each_data_set_writes_its_own_document_and_plots(
    load_modules: Load, tmp_path: Path
) -> None:
    for data, name in NAMES.items():
        document = load_modules(data).document
        text = document.DOCUMENT.read_text(encoding="utf8")
        document.DOCUMENT = tmp_path / document.DOCUMENT.name
        document.DOCUMENT.write_text(text, encoding="utf8")
        document.DOCUMENT.with_suffix("").mkdir()
        document.publish(read_result(data))
        assert document.DOCUMENT.stem == name.replace("_", "-")
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 2 * 6
    for path in paths:  # the first document after the second
        assert path.read_bytes() == (DOCS / path.relative_to(tmp_path)).read_bytes()


def test_a_job_gives_the_raw_result(load_modules: Load) -> None:
    parts = load_modules("digits")
    jobs = list(zip(parts.smaller.list_jobs(RAW), RAW["smaller"]["runs"], strict=True))
    job, other = next(pair for pair in jobs if pair[0]["rule"] == "none")
    again = parts.smaller.run_job(**{**job, "size": FULL})
    run = next(r for _, r in jobs if (r["rule"], r["size"], r["seed"]) == ("none", FULL, 0))
    # another processor rounds differently, and the file has five figures
    assert again["train_loss"] == pytest.approx(run["train_loss"], rel=1e-3)
    assert again["train_loss"] != pytest.approx(other["train_loss"], rel=1e-2)  # control: at 256


def test_a_size_that_misses_the_target_has_no_gap(load_modules: Load) -> None:
    tables = load_modules("digits").tables
    raw = read_result("digits")
    run = next(r for r in raw["gap"]["runs"] if r["size"] == 256)
    for key in ("train_loss", "test_loss", "train_error", "test_error"):
        run.pop(key)
    run["updates"] = None
    rows = tables.format_tables(raw)["gap"].splitlines()
    (row,) = [line for line in rows if line.startswith("| 256 |")]
    assert "| reached by 2 of 3 |" in row


def test_a_loss_reached_in_the_first_epoch_is_not_called_missed(load_modules: Load) -> None:
    tables = load_modules("digits").tables
    metrics = {"train_error": [0.2, 0.1], "test_error": [0.3, 0.2], "test_loss": [0.5, 0.4]}
    early, later, never = (
        {**metrics, "train_loss": losses} for losses in ([0.1, 0.05], [0.4, 0.1], [0.4, 0.3])
    )
    assert tables._format_gap([early, later], 0.2) == "in the first epoch by 1 of 2, later by 1"
    assert tables._format_gap([later, never], 0.2) == "reached by 1 of 2"
    assert tables._format_gap([never, never], 0.2) == "not reached"


def test_an_interval_without_an_upper_end_begins_where_the_difference_is_t_standard_errors(
    load_modules: Load,
) -> None:
    parts = load_modules("digits")
    rng = np.random.default_rng(0)
    above, below = rng.normal(5.0, 0.5, 40), rng.normal(0.0, 1.0, 40)
    below += 0.1 - below.mean()  # which may be 0
    low, high = parts.noise.fieller_interval(above.tolist(), below.tolist(), 2.0)
    assert high == math.inf

    def standard_errors(ratio: float) -> float:
        difference = above - ratio * below
        return float(abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(40)))

    assert standard_errors(low) == pytest.approx(2.0, rel=1e-9)
    assert standard_errors(0.9 * low) > 2.0 > standard_errors(1.1 * low)
    assert parts.tables._format_interval([-7.0, 3.0, None]) == "unresolved (3 and more)"
    assert parts.tables._format_interval([7.0, 3.0, 9.0]) == "7 (3 to 9)"
    assert not parts.tables._contains([7.0, 3.0, 9.0], -7.0)
    assert parts.tables._contains([-7.0, 3.0, None], -7.0)
