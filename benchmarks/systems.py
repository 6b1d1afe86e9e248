"""Train the systems on Fashion-MNIST: accuracy over seeds, and time.

Each recipe is trained from several seeds on the training set, and evaluated on the official test
set. A training has one thread, and two run at a time. The result file is written after each one,
and the table of docs/systems.md once all systems have the same number.

    python benchmarks/systems.py [--only NAME ...] [--resume] [--seeds 3] [--write]
    python benchmarks/systems.py --data digits     # some minutes; nothing is written
"""

import argparse
import json
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import sha256
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import anybatch
from anybatch.recipe.build import build
from anybatch.recipe.files import find_recipe
from anybatch.recipe.runs import create_run, load_recipe
from anybatch.recipe.train import train
from machine import RESULTS, machine, write
from tables import format_table, update_document

DOCUMENT = Path(__file__).parents[1] / "docs" / "systems.md"
Runs = defaultdict[str, list[dict[str, Any]]]
SYSTEMS = (
    "tf-mnist-beginners",
    "tf-cifar10",
    "caffe-lenet",
    "dln-logistic",
    "dln-mlp",
    "dln-sum",
    "ng",
    "goyal",
)


def train_system(name: str, seed: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Train a recipe, and return its accuracy on the held-out data and its time.

    Args:
        name: of a shipped recipe.
        seed: of initial weights and order.
        changes: to other keys, "section.key=value".
    """
    recipe, _, _ = load_recipe(name, [f"run.seed={seed}", *changes], allow_code=False)
    training = build(recipe, allow_code=False)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        with create_run(recipe, Path(folder) / "run") as run:
            for progress in train(training, run):
                last = progress
        seconds = time.process_time() - start
    assert last.held_out is not None
    updates = last.step.step + 1
    return {
        "seed": seed,
        "accuracy": last.held_out.metrics["accuracy"],
        "loss": last.held_out.loss,
        "updates": updates,
        "examples": training.order.examples_before(updates),
        "epochs": last.step.epoch + 1,
        "cpu_seconds": round(seconds, 2),
        "recipe_sha256": hash_recipe(name),
        "anybatch": anybatch.__version__,
    }


def hash_recipe(name: str) -> str:
    """Return the SHA-256 of a recipe's keys and values, without its comments."""
    tree = tomllib.loads(find_recipe(name).read_text())
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read_other_runs(args: argparse.Namespace) -> Runs:
    """Read the runs of the result file that stay: those of other systems, or all to resume."""
    file = RESULTS / "systems.json"
    if not args.write or not file.exists() or not (args.only or args.resume):
        return defaultdict(list)
    result = json.loads(file.read_text())
    without = {"git": None, "anybatch": None}  # each run states its version of anybatch
    if {**result["machine"], **without} != {**machine(), **without}:
        raise SystemExit(f"{file} comes from another machine or other versions. Run all systems.")
    repeated = () if args.resume else args.only
    return defaultdict(
        list, {n: runs for n, runs in result["systems"].items() if n not in repeated}
    )


def _has_run(name: str, seed: int, runs: Runs) -> bool:
    """Return whether the result has this run of the present recipe."""
    return any(
        (run["seed"], run["recipe_sha256"]) == (seed, hash_recipe(name)) for run in runs[name]
    )


def format_tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Format the tables of the document, by name."""
    machine = result["machine"]
    row = (machine["processor"], f"{machine['threads']}", "2")
    head = ("processor", "threads a run", "runs side by side")
    return {"machine": format_table(head, [row]), "systems": format_runs(result["systems"])}


def format_runs(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format the accuracy and the time of each system."""
    rows = []
    for name, runs in systems.items():
        accuracies = [100 * run["accuracy"] for run in runs]
        deviation = f" ± {stdev(accuracies):.2f}" if len(runs) > 1 else ""
        epochs, updates = (
            _format_range([run[key] for run in runs]) for key in ("epochs", "updates")
        )
        seconds, examples = (sum(run[key] for run in runs) for key in ("cpu_seconds", "examples"))
        link = f"[{name}](../recipes/{name}.toml)"
        cells = (f"{mean(accuracies):.2f}{deviation}", epochs, updates)
        rows.append((link, *cells, f"{seconds / len(runs):.0f}", f"{examples / seconds:,.0f}"))
    head = ("recipe", "accuracy, %", "epochs", "updates", "CPU seconds", "examples a CPU second")
    return format_table(head, rows)


def _format_range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, help="only these systems")
    parser.add_argument("--data", choices=["fashion-mnist", "digits"], default="fashion-mnist")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each system")
    parser.add_argument("--resume", action="store_true", help="only the runs that are missing")
    parser.add_argument(
        "--write", action="store_true", help="write the raw result and the document"
    )
    args = parser.parse_args()
    if args.write and args.data == "digits":
        parser.error("--write needs the data of the document, fashion-mnist")
    return args


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    runs = _read_other_runs(args)
    suffix = "-digits" if args.data == "digits" else ""
    names = [name + suffix for name in args.only or SYSTEMS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        cells = product(range(args.seeds), names)
        jobs = {
            pool.submit(train_system, name, seed): name
            for seed, name in cells
            if not _has_run(name, seed, runs)
        }
        for done in as_completed(jobs):
            name, run = jobs[done], done.result()
            print(f"{name}: {run}", flush=True)
            others = [other for other in runs[name] if other["seed"] != run["seed"]]
            runs[name] = sorted([*others, run], key=lambda run: int(run["seed"]))
            if args.write:
                _write(runs)
    if args.write:
        _write(runs)
    print(format_runs({name: runs[name] for name in names}))


def _write(runs: Runs) -> None:
    """Write the result file, and the table once every system has the same number of runs."""
    systems = {name: runs[name] for name in SYSTEMS if runs[name]}
    path = write("systems", {"systems": systems})
    if len(systems) == len(SYSTEMS) and len(set(map(len, systems.values()))) == 1:
        update_document(DOCUMENT, format_tables(json.loads(path.read_text())), {})


if __name__ == "__main__":
    main()
