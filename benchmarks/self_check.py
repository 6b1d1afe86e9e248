"""Measure the share of a run's time that the self-check takes.

    share = (check at the 1st update + 3 checks at the 10th, 100th, 1000th) / (1000 updates)

Updates of a batch cut in two take turns in one process, with and without a check. The time of a
check is the median difference. The first check copies the weights; later ones do not.

    python benchmarks/self_check.py [--write]     # also the table of docs/performance.md
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.gradient import self_check, survey
from anybatch.zoo import gpt, lenet, mlp
from performance import write_result
from tables import format_table

Batch = tuple[Tensor, Tensor]


def classes(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def tokens(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


TIMES = ("update", "first_check", "later_check")
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Batch]]] = {
    "784-128-10, B=64": (
        lambda: mlp([784], [128]),
        classes,
        lambda: (torch.rand(64, 784), torch.randint(10, (64,))),
    ),
    "LeNet 28x28, B=64": (
        lambda: lenet(28),
        classes,
        lambda: (torch.rand(64, 1, 28, 28), torch.randint(10, (64,))),
    ),
    "GPT d=256, 4 layers, T=128, B=16": (
        lambda: gpt(256, 256, 4, 4, 128),
        tokens,
        lambda: (torch.randint(256, (16, 128)), torch.randint(256, (16, 128))),
    ),
}


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Time an update, a first check and a later check."""
    make, losses, batch_of = CASES[name]
    torch.manual_seed(0)
    model, objective, batch = make(), ab.Objective(losses), batch_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    layout = ab.Layout(len(batch[1]) // 2)
    facts = survey.get_facts(model, losses, survey.survey_model(model).mode)

    def seconds(num_cut: int) -> float:
        """Time the update after this number of cut updates."""
        facts.num_cut = num_cut
        start = time.perf_counter()
        ab.batch_gradient(model, objective, batch, layout=layout)
        optimizer.step()
        return time.perf_counter() - start

    unchecked, first, later = 1, 0, 9  # the 2nd update, the 1st, the 10th
    rows = [[seconds(n) for n in (unchecked, first, unchecked, later)] for _ in range(rounds + 3)]
    rows = rows[3:]
    update = median(min(row[0], row[2]) for row in rows)
    checks = [median(row[k] - row[k - 1] for row in rows) for k in (1, 3)]
    return {
        "update_seconds": update,
        "first_check_seconds": checks[0],
        "later_check_seconds": checks[1],
        "share_of_1000_updates": (checks[0] + 3 * checks[1]) / (1000 * update),
        "rows_seconds": [[round(s, 6) for s in row] for row in rows],
    }


def format_tables(self_check: dict[str, Any]) -> dict[str, str]:
    """Format the table of docs/performance.md."""
    rows = [
        (
            name,
            *(f"{1e3 * result[f'{time}_seconds']:.1f} ms" for time in TIMES),
            f"{100 * result['share_of_1000_updates']:.2f} %",
        )
        for name, result in self_check["cases"].items()
    ]
    head = ("network", "an update", "the first check", "later ones", "share of the run")
    return {"checks": format_table(head, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the table")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    assert {1, 10} <= self_check.CHECKED
    results = {}
    for name in CASES:
        result = results[name] = compare(name, args.rounds)
        print(
            f"{name}: an update {result['update_seconds'] * 1e3:.2f} ms, the first check "
            f"{result['first_check_seconds'] * 1e3:.2f} ms, later ones "
            f"{result['later_check_seconds'] * 1e3:.2f} ms; "
            f"{100 * result['share_of_1000_updates']:.2f} % of 1,000 updates"
        )
    if args.write:
        print(write_result("self_check", {"cases": results}))


if __name__ == "__main__":
    main()
