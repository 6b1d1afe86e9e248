"""The systems on Fashion-MNIST: accuracy over seeds, time, and what is reported of the originals.

Each recipe is trained from several seeds, on the training set, and judged by the official test
set; one thread a run, two runs side by side. The result file is written after each run, and with
it docs/systems.md.

    python benchmarks/systems.py [--only NAME ...] [--resume] [--seeds 3] [--write]
    python benchmarks/systems.py --data digits     # some minutes; nothing is written
"""

import argparse
import json
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import sha256
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from anybatch.recipe.build import build
from anybatch.recipe.files import find_recipe
from anybatch.recipe.runs import create_run, load_recipe
from anybatch.recipe.train import train
from machine import RESULTS, machine, write
from systems_text import SYSTEMS, row_of, text_from

DOCUMENT = Path(__file__).parents[1] / "docs" / "systems.md"
Runs = defaultdict[str, list[dict[str, Any]]]


def trained(name: str, seed: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """One run of a recipe: what its last weights are worth on the held-out data, and its time.

    Args:
        name: of a shipped recipe.
        seed: of initial weights and order.
        changes: of other keys, "section.key=value".
    """
    recipe, _, _ = load_recipe(name, [f"run.seed={seed}", *changes], allow_code=False)
    setup = build(recipe, allow_code=False)
    with tempfile.TemporaryDirectory() as folder:
        begun_at = time.process_time()
        with create_run(recipe, Path(folder) / "run") as run:
            for progress in train(setup, run):
                last = progress
        seconds = time.process_time() - begun_at
    assert last.held_out is not None
    updates = last.step.step + 1
    return {
        "seed": seed,
        "accuracy": last.held_out.metrics["accuracy"],
        "loss": last.held_out.loss,
        "updates": updates,
        "examples": setup.order.examples_before(updates),
        "epochs": last.step.epoch + 1,
        "cpu_seconds": round(seconds, 2),
        "recipe_sha256": stated(name),
    }


def stated(name: str) -> str:
    """SHA-256 of what a recipe states, whatever its comments say."""
    tree = tomllib.loads(find_recipe(name).read_text())
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _kept(args: argparse.Namespace) -> Runs:
    """The runs of the result file that are to stay: other systems', or all when resumed."""
    file = RESULTS / "systems.json"
    if not args.write or not file.exists() or not (args.only or args.resume):
        return defaultdict(list)
    found = json.loads(file.read_text())
    if {**found["machine"], "git": None} != {**machine(), "git": None}:
        raise SystemExit(f"{file} was made on another machine, or by other versions: run them all.")
    redone = () if args.resume else args.only
    return defaultdict(list, {n: runs for n, runs in found["systems"].items() if n not in redone})


def _is_there(name: str, seed: int, kept: Runs) -> bool:
    """Whether that run of the recipe as it is has been made."""
    return any((run["seed"], run["recipe_sha256"]) == (seed, stated(name)) for run in kept[name])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, help="these systems alone")
    parser.add_argument("--data", choices=["fashion-mnist", "digits"], default="fashion-mnist")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each system")
    parser.add_argument("--resume", action="store_true", help="only the runs that are missing")
    parser.add_argument(
        "--write", action="store_true", help="keep the raw result, and the document"
    )
    args = parser.parse_args()
    if args.write and args.data == "digits":
        parser.error("--write expects the data of the document, fashion-mnist")
    return args


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    kept = _kept(args)
    suffix = "-digits" if args.data == "digits" else ""
    names = [name + suffix for name in args.only or SYSTEMS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        wanted = product(range(args.seeds), names)
        jobs = {
            pool.submit(trained, name, seed): name
            for seed, name in wanted
            if not _is_there(name, seed, kept)
        }
        for done in as_completed(jobs):
            name, run = jobs[done], done.result()
            print(f"{name}: {run}", flush=True)
            others = [other for other in kept[name] if other["seed"] != run["seed"]]
            kept[name] = sorted([*others, run], key=lambda run: int(run["seed"]))
            if args.write:
                _write(kept)
    if args.write:
        _write(kept)
    print("\n".join(row_of(name, kept[name]) for name in names))


def _write(kept: Runs) -> None:
    """The result file, and the document once every system has as many runs."""
    systems = {name: kept[name] for name in SYSTEMS if kept[name]}
    path = write("systems", {"systems": systems})
    if len(systems) == len(SYSTEMS) and len({len(runs) for runs in systems.values()}) == 1:
        DOCUMENT.write_text(text_from(json.loads(path.read_text())), encoding="utf8")


if __name__ == "__main__":
    main()
