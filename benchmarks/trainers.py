"""Compare an epoch of `ab.steps` with an epoch of other trainers, and of a loop by hand.

    epochs       train on all examples once, then evaluate the validation part
    starts       the same with a single update: what a trainer spends once a run
    cut          train on all examples once, each update cut into 16 micro-batches
    distance     |weights - those of whole batches| / |their change|, cut, in float64, where the
                 last update has fewer examples

Every trainer gets the same network, data in memory, batch sizes and SGD with momentum, and no
progress bar, logger and checkpoint; only `ab.steps` writes its records. Examples are in the same
order, so all must end with nearly the same weights. Each round times all of them in turns, after a
round to warm up, in processor seconds of one thread. Figures are medians of the ratio to the loop
by hand. Keras runs in processes of its own, and JAX where it is installed, or lies in a folder:

    pip install --target FOLDER jax
    python benchmarks/trainers.py [--jax FOLDER] [--write] [--rounds 4] [--only LeNet]
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from statistics import median
from typing import Any

from torch import Tensor
from torch.nn.utils import parameters_to_vector

from machine import use_one_core
from performance import write_result
from tables import format_ratio, format_table
from trainers_keras import KerasProcess
from trainers_ways import (
    CUT,
    CUT_WAYS,
    EPOCHS,
    PIECES,
    RAGGED,
    STARTS,
    WAYS,
    Case,
    Epoch,
    Way,
    evaluate_by_hand,
)

KERAS = {"Keras on torch": "torch", "Keras on JAX": "jax"}
PACKAGES = ("torch", "lightning", "transformers", "skorch", "accelerate", "keras", "jax")
TOLERANCE = 0.05
"""Of the change: other orders of summation move weights and losses, ResNet-18's the most."""
Train = Callable[[bool], Epoch]  # is_first: also compute the loss and the change of the weights


def train_module(way: Way, case: Case, pieces: int, is_first: bool) -> Epoch:
    """Train the network of a case for an epoch, and evaluate."""
    (train, held_out), model = case.make_data(), case.make_network()
    before = parameters_to_vector(model.parameters()).detach().clone()
    wall, start = time.perf_counter(), time.process_time()
    loss = way(model, train, held_out, case.batch_size, pieces)
    seconds = time.process_time() - start, time.perf_counter() - wall
    if not is_first:
        return Epoch(*seconds, loss)
    change = parameters_to_vector(model.parameters()).detach() - before
    return Epoch(*seconds, loss, evaluate_by_hand(model, train, case.batch_size), change)


def compute_distance(change: Tensor, right: Tensor) -> float:
    return float((change - right).norm() / right.norm())


def check_training(case: Case, firsts: dict[str, Epoch]) -> dict[str, dict[str, float]]:
    """Return the distance from the loop by hand: of losses and weights, over their change.

    Raises:
        RuntimeError: a way has trained in another way, or has evaluated other weights.
    """
    train, held_out = case.make_data()
    right = firsts["by hand"]
    moved = evaluate_by_hand(case.make_network(), train, case.batch_size) - right.train_loss
    distances: dict[str, dict[str, float]] = {}
    for name, epoch in firsts.items():
        each = {"train loss": abs((epoch.train_loss - right.train_loss) / moved)}
        if held_out:
            difference = epoch.validation_loss - right.validation_loss
            each["validation loss"] = abs(difference / moved)
        if epoch.change is not None:
            each["weights"] = compute_distance(epoch.change, right.change)
        if not max(each.values()) < TOLERANCE:
            raise RuntimeError(f"{name} is away from the loop by hand, over the change: {each}.")
        distances[name] = each
    return distances


def compare(case: Case, ways: dict[str, Train], rounds: int) -> dict[str, Any]:
    """Time all ways in turns."""
    firsts = {name: train(True) for name, train in ways.items()}
    distances = check_training(case, firsts)
    epochs: dict[str, list[Epoch]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        start = number % len(names)  # each comes first, second, ... once
        for name in names[start:] + names[:start]:
            epochs[name].append(ways[name](False))
    times = {n: [(e.processor_seconds, e.wall_seconds) for e in each] for n, each in epochs.items()}
    base = times["by hand"]

    def divide(name: str, clock: int) -> float:
        return median(a[clock] / b[clock] for a, b in zip(times[name], base, strict=True))

    return {
        "distances": distances,
        "seconds": {name: median(row[0] for row in rows) for name, rows in times.items()},
        "over_by_hand": {name: divide(name, 0) for name in ways},
        "wall_over_by_hand": {name: divide(name, 1) for name in ways},
        "seconds_beyond_by_hand": {
            name: median(a[0] - b[0] for a, b in zip(rows, base, strict=True))
            for name, rows in times.items()
        },
        "first_seconds": {name: epoch.processor_seconds for name, epoch in firsts.items()},
        "processor_and_wall_seconds": times,
    }


def measure_distances() -> dict[str, float]:
    """Return how far cut updates are from whole ones, where the last one has fewer examples."""
    right = train_module(WAYS["by hand"], RAGGED, 1, True).change
    return {
        name: compute_distance(train_module(way, RAGGED, PIECES, True).change, right)
        for name, way in CUT_WAYS.items()
    }


def format_rows(cases: dict[str, Any], ways: list[str], last: dict[str, str]) -> list[list[str]]:
    """Format a row for each way. `ab.steps` aims at the fastest other trainer."""
    ours = ways[0], *(way for way in ways if "ab.steps" in way)

    def format_cell(way: str, ratios: dict[str, float]) -> str:
        if way not in ratios:
            return "not installed"
        aim = min(ratio for name, ratio in ratios.items() if name not in ours)
        return format_ratio(ratios[way], aim if way in ours else None)

    rows = [["by hand", *(f"{case['seconds']['by hand']:.2f} s" for case in cases.values())]]
    for way in ways[1:]:
        rows.append([way, *(format_cell(way, case["over_by_hand"]) for case in cases.values())])
    return [[*row, last.get(row[0], "")] for row in rows]


def format_tables(trainers: dict[str, Any]) -> dict[str, str]:
    """Format the tables of docs/performance.md; a way that was not measured has no figures."""
    epochs, cut = trainers["cases"]["epochs"], trainers["cases"]["cut"]
    (start,) = trainers["cases"]["starts"].values()
    beyond = start["seconds_beyond_by_hand"].items()
    starts = {way: f"{round(1e3 * seconds)} ms" for way, seconds in beyond if way != "by hand"}
    distances = {way: f"{value:.0e}" for way, value in trainers["cases"]["distance"].items()}
    rows = format_rows(epochs, [*WAYS, *KERAS], starts)
    cut_rows = format_rows(cut, list(CUT_WAYS), distances)
    return {
        "trainers": format_table(["trainer", *epochs, "once a run"], rows),
        "trainers-cut": format_table(["trainer", *cut, "distance"], cut_rows),
    }


def find_versions(folder: str) -> dict[str, str]:
    """Return the versions of the trainers; those in the folder come last."""
    path = [*sys.path, *([folder] if folder else [])]
    packages = {name: list(metadata.distributions(name=name, path=path)) for name in PACKAGES}
    return {name: each[0].version if each else "not installed" for name, each in packages.items()}


def run_all(rounds: int, only: str, processes: dict[str, KerasProcess]) -> dict[str, Any]:
    """Measure every case whose name contains `only`."""
    results: dict[str, Any] = {}
    for part, cases, modules, pieces in (
        ("epochs", EPOCHS, WAYS, 1),
        ("starts", STARTS, WAYS, 1),
        ("cut", CUT, CUT_WAYS, PIECES),
    ):
        results[part] = {}
        for name, case in cases.items():
            if only not in name:
                continue
            ways: dict[str, Train] = {
                way: partial(train_module, run, case, pieces) for way, run in modules.items()
            }
            if part != "cut":
                ways |= {way: partial(p.train, name) for way, p in processes.items()}
            results[part][name] = compare(case, ways, rounds)
            ratios = results[part][name]["over_by_hand"].items()
            print(f"{part:7}{name:27}" + ", ".join(f"{n} {r:.2f}" for n, r in ratios), flush=True)
    results["distance"] = measure_distances()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the tables")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", default="", help="networks whose names contain this")
    parser.add_argument("--jax", default="", help="folder in which JAX is installed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for part in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "accelerate"):
        logging.getLogger(part).setLevel(logging.ERROR)
    versions = find_versions(args.jax)
    backends = {n: b for n, b in KERAS.items() if b != "jax" or versions["jax"] != "not installed"}
    with use_one_core():
        processes = {name: KerasProcess(each, args.jax) for name, each in backends.items()}
        cases = run_all(args.rounds, args.only, processes)
        for process in processes.values():
            process.close()
    if args.write:
        print(write_result("trainers", {"versions": versions, "cases": cases}))


if __name__ == "__main__":
    main()
