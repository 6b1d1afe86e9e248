"""What LeNet on digits learns: held-out accuracy over the five keyed splits, after each training.

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


def accuracy_of(split: int, folder: Path) -> float:
    """Held-out accuracy after the last epoch of the recipe as shipped."""
    recipe, _, _ = load_recipe("lenet-digits", [f"data.split={split}"], allow_code=False)
    setup = build(recipe, allow_code=False)
    with create_run(recipe, folder) as run:
        for progress in train(setup, run):
            held_out = progress.held_out
    assert held_out is not None
    return held_out.metrics["accuracy"]


def measure(folder: Path) -> dict[str, Any]:
    """Accuracy and seconds of each split."""
    accuracies, seconds = [], []
    for split in SPLITS:
        begun_at = time.perf_counter()
        accuracies.append(accuracy_of(split, folder / str(split)))
        seconds.append(round(time.perf_counter() - begun_at, 3))
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
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(
        f"held-out accuracy over {len(found['accuracies'])} splits: mean {found['mean']:.4f}, "
        f"to reach {MEAN_TO_REACH}; minimum {found['min']:.4f}"
    )
    if args.write:
        print(write("demo_accuracy", found))


if __name__ == "__main__":
    main()
