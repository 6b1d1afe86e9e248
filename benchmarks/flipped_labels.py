"""Are wrong labels among the examples with the largest gradients?

A tenth of the labels of scikit-learn's digits is flipped to another class, by a seeded draw; LeNet
is trained on all of them, observed; then the examples are ranked by their mean gradient norm over
all visits. Of the flipped ones, how many are in the top tenth, by norm and by loss? By chance it
would be a tenth.

    python benchmarks/flipped_labels.py [--write]     # also writes docs/flipped-labels.md
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import anybatch as ab
from anybatch.data import load_digits
from anybatch.runs.ledger_files import rank_examples, read_ledger
from anybatch.zoo import cross_entropy, lenet
from machine import RESULTS, write

DOCUMENT = Path(__file__).parents[1] / "docs" / "flipped-labels.md"
FRACTION, EPOCHS, BATCH, SEEDS = 0.1, 20, 64, 5


def flipped(targets: torch.Tensor, seed: int) -> tuple[torch.Tensor, set[int]]:
    """The labels with a tenth of them changed to another class, and which these are."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(targets), generator=generator)[: round(FRACTION * len(targets))]
    shift = torch.randint(1, 10, (len(chosen),), generator=generator)
    changed = targets.clone()
    changed[chosen] = (targets[chosen] + shift) % 10
    return changed, set(chosen.tolist())


def measured(seed: int) -> dict[str, Any]:
    """How many of the flipped examples are found, for one draw of flips, weights and order."""
    inputs, targets = load_digits().columns
    labels, wrong = flipped(targets, seed)
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
    found = {
        by: sum(row["example"] in wrong for row in rank_examples(columns, by, top))
        for by in ("norm", "loss")
    }
    return {"seed": seed, "flipped": len(wrong), "top": top, **found}


def text_of(result: dict[str, Any]) -> str:
    """docs/flipped-labels.md, from the raw result."""
    rows = result["runs"]
    shares = {
        by: [run[by] / run["flipped"] for run in rows]
        for by in ("norm", "loss")  # of each seed
    }

    def cell(run: dict[str, Any], by: str) -> str:
        return f"{run[by]} ({run[by] / run['flipped']:.0%})"

    means = [f"{sum(shares[by]) / len(rows):.0%}" for by in ("norm", "loss")]
    lines = [
        "# Wrong labels, found by their gradients",
        "",
        "A tenth of the labels of scikit-learn's 1,797 digits is flipped to another class. LeNet",
        f"is trained on them for {EPOCHS} epochs, observed, and the examples are ranked by their",
        "mean gradient norm over all visits (`anybatch examples RUN --by norm`). Of the flipped",
        "examples, so many are in the top tenth; by chance it would be a tenth of them:",
        "",
        "| seed | flipped | in the top tenth by norm | by loss |",
        "|---|---|---|---|",
        *(
            f"| {run['seed']} | {run['flipped']} | {cell(run, 'norm')} | {cell(run, 'loss')} |"
            for run in rows
        ),
        f"| mean | | {means[0]} | {means[1]} |",
        "",
        "Made by `benchmarks/flipped_labels.py`, "
        "[raw](../benchmarks/results/flipped_labels.json), on one thread.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the raw result, and the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"runs": [measured(seed) for seed in range(SEEDS)]}
    print(text_of(result))
    if args.write:
        path = write("flipped_labels", result)
        assert path.parent == RESULTS
        DOCUMENT.write_text(text_of(json.loads(path.read_text())), encoding="utf8")


if __name__ == "__main__":
    main()
