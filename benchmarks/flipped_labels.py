"""Count the wrong labels among the examples with the largest gradients.

A seeded draw flips a tenth of the labels of scikit-learn's digits to another class. LeNet trains on
all of them, observed. Then the examples are ranked by their mean gradient norm over all visits. How
many of the flipped ones are in the top tenth, by norm and by loss? By chance it would be a tenth.

    python benchmarks/flipped_labels.py [--write]     # also the table of docs/flipped-labels.md
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import anybatch as ab
from anybatch.data import load_digits
from anybatch.runs.ledger_files import rank_examples, read_ledger
from anybatch.zoo import cross_entropy, lenet
from machine import write
from tables import format_table, update_document

DOCUMENT = Path(__file__).parents[1] / "docs" / "flipped-labels.md"
FRACTION, EPOCHS, BATCH, SEEDS = 0.1, 20, 64, 5


def flip_labels(targets: torch.Tensor, seed: int) -> tuple[torch.Tensor, set[int]]:
    """Return the labels with a tenth of them changed to another class, and the changed ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(len(targets), generator=generator)[: round(FRACTION * len(targets))]
    shift = torch.randint(1, 10, (len(ids),), generator=generator)
    changed = targets.clone()
    changed[ids] = (targets[ids] + shift) % 10
    return changed, set(ids.tolist())


def count_flips(seed: int) -> dict[str, Any]:
    """Count the flipped examples in the top tenth, for one draw of flips, weights and order."""
    inputs, targets = load_digits().columns
    labels, wrong = flip_labels(targets, seed)
    torch.manual_seed(seed)
    model = lenet(image=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = ab.Order(len(labels), batch_size=BATCH, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        for _ in ab.steps(
            model,
            ab.Objective(cross_entropy, penalty=ab.L2(5e-4)),
            optimizer,
            (inputs, labels),
            order=order,
            epochs=EPOCHS,
            observe=ab.Observe(norms=True),
            run=Path(folder) / "run",
        ):
            pass
        columns = read_ledger(Path(folder) / "run")
    top = round(FRACTION * len(labels))
    counts = {
        by: sum(row["example"] in wrong for row in rank_examples(columns, by, top))
        for by in ("norm", "loss")
    }
    return {"seed": seed, "flipped": len(wrong), "top": top, **counts}


def format_runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format how many flipped examples are in the top tenth, by seed and in the mean."""
    rows = [
        (
            *(f"{run['seed']}", f"{run['flipped']}"),
            *(f"{run[by]} ({run[by] / run['flipped']:.0%})" for by in ("norm", "loss")),
        )
        for run in runs
    ]
    means = [f"{mean(run[by] / run['flipped'] for run in runs):.0%}" for by in ("norm", "loss")]
    head = ("seed", "flipped", "in the top tenth by norm", "by loss")
    return format_table(head, [*rows, ("mean", "", *means)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"runs": [count_flips(seed) for seed in range(SEEDS)]}
    print(format_runs(result["runs"]))
    if args.write:
        write("flipped_labels", result)
        update_document(DOCUMENT, {"flips": format_runs(result["runs"])}, {})


if __name__ == "__main__":
    main()
