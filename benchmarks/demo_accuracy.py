"""Measure the held-out accuracy of LeNet on digits, over the five keyed splits.

python benchmarks/demo_accuracy.py [--write]
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from anybatch.recipe.build import build
from anybatch.recipe.runs import create_run, load_recipe
from anybatch.recipe.train import train
from machine import write

SPLITS = range(5)
MEAN_TO_REACH = 0.98


def measure_accuracy(split: int, folder: Path) -> float:
    """Return the held-out accuracy of the shipped recipe after the last epoch."""
    recipe, _, _ = load_recipe("lenet-digits", [f"data.split={split}"], allow_code=False)
    training = build(recipe, allow_code=False)
    with create_run(recipe, folder) as run:
        for progress in train(training, run):
            held_out = progress.held_out
    assert held_out is not None
    return held_out.metrics["accuracy"]


def measure(folder: Path) -> dict[str, Any]:
    """Measure accuracy and seconds of each split."""
    accuracies, seconds = [], []
    for split in SPLITS:
        start = time.perf_counter()
        accuracies.append(measure_accuracy(split, folder / str(split)))
        seconds.append(round(time.perf_counter() - start, 3))
    return {
        "recipe": "lenet-digits",
        "accuracies": accuracies,
        "mean": mean(accuracies),
        "min": min(accuracies),
        "mean_to_reach": MEAN_TO_REACH,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    print(
        f"held-out accuracy over {len(result['accuracies'])} splits: mean {result['mean']:.4f}, "
        f"to reach {MEAN_TO_REACH}; minimum {result['min']:.4f}"
    )
    if args.write:
        print(write("demo_accuracy", result))


if __name__ == "__main__":
    main()
