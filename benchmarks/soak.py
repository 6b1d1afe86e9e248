"""Train for 100,000 updates, and see whether the memory of the process stays the same.

`ab.steps` with a run: records at each update, a checkpoint every 10,000, and every tenth update
observed by `ab.observe` on another batch. The resident memory is read every 5,000 updates, from
the 20,000th on: `growth` is the last reading over the first.

    python benchmarks/soak.py [--updates 100000] [--write]
"""

import argparse
import gc
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from machine import write

BATCH, EVERY = 16, 5000


def read_memory() -> int:
    """Return the resident bytes of this process."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Return one loss for each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(num_updates: int, folder: Path) -> dict[str, Any]:
    """Train, and read the memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = torch.randn(4000, 20), torch.randint(5, (4000,))
    beside = data[0][:BATCH], data[1][:BATCH]
    readings: list[tuple[int, int]] = []
    start = time.perf_counter()
    for step in ab.steps(
        model,
        ab.Objective(losses),
        optimizer,
        data,
        order=ab.Order(4000, batch_size=BATCH, seed=0),
        steps=num_updates,
        run=ab.Run(folder / "run", checkpoint_every=10_000),
    ):
        if step.step % 10 == 0:
            gradients = [p.grad for p in model.parameters()]
            with ab.observe(model):
                F.cross_entropy(model(beside[0]), beside[1]).backward()
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
        if (step.step + 1) % EVERY == 0:
            gc.collect()
            readings.append((step.step + 1, read_memory()))
    later = [memory for number, memory in readings if number > num_updates // 5]
    return {
        "updates": num_updates,
        "seconds": time.perf_counter() - start,
        "readings": readings,
        "growth": later[-1] / later[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = train(args.updates, Path(folder))
    for number, memory in result["readings"]:
        print(f"{number:>8,} updates: {memory / 2**20:.1f} MiB")
    print(f"growth {result['growth']:.3f}, {result['seconds']:.0f} s")
    if args.write:
        print(write("soak", result))


if __name__ == "__main__":
    main()
