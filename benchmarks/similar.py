"""Show what similar examples find among digits, and what projections of gradients cost.

wrong     Each held-out digit that LeNet predicts wrongly: the training digits whose gradients
          oppose its own the most. Then LeNet trains again without 20 of them, and again without
          20 random digits of the predicted class. How far does the loss of the digit fall?
planted   20 training digits are in the data twice, and copies of 20 held-out digits have the
          label of another class. At which rank is each?
cost      Processor time of a step with norms, and with norms and projections to 512 numbers,
          over an unobserved one: medians over rounds, in turn (A B A B ...).

python benchmarks/similar.py [--write]     # also the tables of docs/similar.md
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from anybatch.data import load_digits
from anybatch.ledger.ledger import Observe
from anybatch.recipe.build import Setup, build
from anybatch.recipe.files import find_recipe, read_recipe
from anybatch.recipe.orders import build_order
from anybatch.recipe.results import predict_examples
from anybatch.recipe.similar import rank_for_held_out
from anybatch.runs.run import Run
from anybatch.runs.similar import rank_similar
from machine import write
from observed_models import CASES
from observed_step import NUM_CONFIRMED, build_ours, median_ratio, time_steps
from tables import format_table, update_document

DOCUMENT = Path(__file__).parents[1] / "docs" / "similar.md"
SEEDS, TOP, PLANTED, NUM_TRAIN = 3, 20, 20, 1400
SIZE = 512


def build_lenet(seed: int, *changes: str, removed: Sequence[int] = ()) -> Setup:
    """Build the recipe lenet-digits, without some of its training examples."""
    keys = [f"run.seed={seed}", "run.threads=1", *changes]
    recipe = read_recipe(find_recipe("lenet-digits"), keys)
    setup = build(recipe, allow_code=False)
    ids = setup.splits.train
    ids = ids[~torch.isin(ids, torch.tensor(removed, dtype=ids.dtype))]
    return replace(setup, order=build_order(recipe, setup.data, ids, allow_code=False))


def train(setup: Setup, **how: Any) -> Setup:
    """Train to the end, and return the same setup."""
    for _ in setup.make_steps(**how):
        pass
    return setup


def compute_loss(setup: Setup, example: int) -> float:
    """Compute the loss of one example in evaluation mode."""
    inputs, targets = setup.data.select(torch.tensor([example])).columns
    setup.model.eval()
    with torch.no_grad():
        return float(cross_entropy(setup.model(inputs), targets))


def study_wrong(seed: int) -> list[dict[str, Any]]:
    """Study each held-out digit that is predicted wrongly."""
    setup, rows = train(build_lenet(seed)), []
    targets = setup.data.columns[1]
    train_ids = setup.splits.train
    for row in predict_examples(setup, "held_out"):
        example, predicted, target = row["example"], row["class"], row["target"]
        if predicted == target:
            continue
        ends = rank_for_held_out(setup, example, TOP)
        opposed = [one["example"] for one in ends["opposed"]]
        same = train_ids[targets[train_ids] == predicted]
        generator = torch.Generator().manual_seed(example)
        chance = same[torch.randperm(len(same), generator=generator)[: len(opposed)]].tolist()
        rows.append(
            {"seed": seed, "example": example, "target": target, "predicted": predicted}
            | {name: [one["target"] for one in ends[name]] for name in ("opposed", "aligned")}
            | {"cosine": ends["opposed"][0]["cosine"], "loss": compute_loss(setup, example)}
            | {
                name: compute_loss(train(build_lenet(seed, removed=ids)), example)
                for name, ids in (("without_opposed", opposed), ("without_chance", chance))
            }
        )
    return rows


def plant(seed: int, folder: Path) -> tuple[list[int], list[int]]:
    """Write digits with planted examples; return the originals and the copied held-out ones."""
    inputs, targets = (column.numpy() for column in load_digits().columns)
    draw = np.random.default_rng(seed)
    twins = draw.choice(NUM_TRAIN, PLANTED, replace=False)
    copied = NUM_TRAIN + draw.choice(len(targets) - NUM_TRAIN, PLANTED, replace=False)
    wrong = (targets[copied] + draw.integers(1, 10, PLANTED)) % 10
    parts = {
        "train": (
            np.concatenate([inputs[:NUM_TRAIN], inputs[twins], inputs[copied]]),
            np.concatenate([targets[:NUM_TRAIN], targets[twins], wrong]),
        ),
        "held": (inputs[NUM_TRAIN:], targets[NUM_TRAIN:]),
    }
    for name, (x, y) in parts.items():
        np.savez(folder / f"{name}.npz", inputs=x, targets=y)
    return twins.tolist(), (copied + 2 * PLANTED).tolist()  # the ids of the held-out ones


def find_planted(seed: int) -> dict[str, Any]:
    """Find the rank of each planted example, 1 for the first, None if it is not in the list."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        twins, copied = plant(seed, folder)
        paths = [f'{{ path = "{folder / part}.npz" }}' for part in ("train", "held")]
        data = ("data.name=npz", f"data.args={paths[0]}", f"data.held_out={paths[1]}")
        setup = build_lenet(seed, *data, f"observe.projections={SIZE}")
        run = Run(folder / "run")
        train(setup, run=run)
        run.close()
        duplicates, labels = [], []
        for k in range(PLANTED):
            aligned = rank_similar(folder / "run", twins[k], NUM_TRAIN)["aligned"]
            duplicates.append(_find_rank(aligned, NUM_TRAIN + k))
            opposed = rank_for_held_out(setup, copied[k], NUM_TRAIN)["opposed"]
            labels.append(_find_rank(opposed, NUM_TRAIN + PLANTED + k))
    return {"seed": seed, "duplicates": duplicates, "labels": labels}


def _find_rank(rows: Sequence[Mapping[str, Any]], example: int) -> int | None:
    ids = [row["example"] for row in rows]
    return ids.index(example) + 1 if example in ids else None


def measure_cost(seconds: float) -> dict[str, Any]:
    """Measure a step of each model with norms, and with projections."""
    results = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        model, batch = case.make(), case.batch()
        steps: dict[str, Callable[[], object]] = {
            "unobserved": build_ours(case, model, batch),
            "norms": build_ours(case, model, batch, observe=Observe()),
            "projections": build_ours(case, model, batch, observe=Observe(projections=SIZE)),
        }
        for _ in range(NUM_CONFIRMED):
            steps["norms"]()
        times = time_steps(steps, time.process_time, seconds, least=3)
        results[name] = {
            "rounds": len(times["norms"]),
            "milliseconds": {way: 1e3 * median(each) for way, each in times.items()},
            "over_unobserved": {way: median_ratio(times, way, "unobserved") for way in times},
        }
        print(name, results[name], flush=True)
    return results


def format_wrong(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a line for each held-out digit, and the medians."""
    head = (
        *("seed", "digit", "label", "predicted", f"of {TOP} opposed, with the predicted label"),
        *("aligned, with its own", "first cosine", "loss", "without them", "without others"),
    )
    names = ("loss", "without_opposed", "without_chance")
    lines = [
        (
            *(str(row[key]) for key in ("seed", "example", "target", "predicted")),
            str(row["opposed"].count(row["predicted"])),
            str(row["aligned"].count(row["target"])),
            f"{row['cosine']:.2f}",
            *(f"{row[name]:.2f}" for name in names),
        )
        for row in rows
    ]
    counts = (
        median(row["opposed"].count(row["predicted"]) for row in rows),
        median(row["aligned"].count(row["target"]) for row in rows),
    )
    middle = [f"{median(row[name] for row in rows):.2f}" for name in ("cosine", *names)]
    return format_table(head, [*lines, ("median", "", "", "", *map(_shorten, counts), *middle)])


def _shorten(value: float) -> str:
    return f"{value:g}"


def format_planted(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format how many planted examples are first, and the worst rank."""
    rows = []
    for run in runs:
        cells = [str(run["seed"])]
        for kind in ("duplicates", "labels"):
            ranks = run[kind]
            worst = "not listed" if None in ranks else str(max(ranks))
            cells += [f"{ranks.count(1)} of {len(ranks)}", worst]
        rows.append(cells)
    head = ("seed", "duplicates that are first", "worst rank", "wrong labels first", "worst rank")
    return format_table(head, rows)


def format_cost(cases: Mapping[str, Any]) -> str:
    """Format the cost of norms and of projections over an unobserved step."""
    rows = []
    for name, case in cases.items():
        ratios = (f"{case['over_unobserved'][way]:.2f}" for way in ("norms", "projections"))
        rows.append((name, f"{case['milliseconds']['unobserved']:.0f}", *ratios))
    return format_table(("network", "unobserved, ms", "norms", "and projections"), rows)


def format_all(result: Mapping[str, Any]) -> dict[str, str]:
    """Format the tables of docs/similar.md."""
    return {
        "wrong": format_wrong(result["wrong"]),
        "planted": format_planted(result["planted"]),
        "cost": format_cost(result["cost"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the page")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=15, help="for each model, or 3 rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "planted": [find_planted(seed) for seed in range(args.seeds)],
        "wrong": [row for seed in range(args.seeds) for row in study_wrong(seed)],
        "cost": measure_cost(args.seconds),
    }
    for table in format_all(result).values():
        print(table)
    if args.write:
        write("similar", result)
        update_document(DOCUMENT, format_all(result), {})


if __name__ == "__main__":
    main()
