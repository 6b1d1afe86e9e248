"""Measure the cost of gradients whose bits do not depend on the number of ranks.

Every way to compute the gradient of a batch is timed once a round, in turn (A B A B ...), by the
first rank, from one barrier to the next. The result is the median of the ratios in each round.
Ranks are processes of this machine over gloo, with one thread each:

    unobserved   anybatch.batch_gradient by torch's own kernels, the whole share at once
    grains       the same in micro-batches of a grain: the cost of smaller passes
    bitwise      grain by grain, in the fixed tree: all_to_all of slices, all_gather of sums
    gathered     another design: every rank gets every node after its last pass, and adds up all
    DDP          PyTorch: DistributedDataParallel, forward, mean loss, backward

The command fails if the bits of `bitwise` or `gathered` depend on the number of ranks, or if those
of DDP, the control, do not.

    python benchmarks/bitwise.py [--write] [--seconds 15]
"""

import argparse
import copy
import hashlib
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch import distributed
from anybatch.gradient import batch_gradient, pairwise_sum
from anybatch.gradient.pairwise_sum import Node
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.tree_accumulator import TreeAccumulator
from anybatch.kernels import choice as kernels
from anybatch.layout import GrainRange, Layout
from anybatch.objective import Objective
from anybatch.reductions import Mean
from anybatch.training.batches import share_evenly
from anybatch.training.launch import launch
from anybatch.zoo import gpt, mlp
from anybatch.zoo.losses import cross_entropy, token_cross_entropy
from observed_models import cnn
from performance import write_result
from tables import format_ratio, format_table

WORLDS = (1, 2, 4)
AIMS = {"MLP": 1.5, "CNN": 1.15, "GPT": 1.15}
"""Upper limits on two and four ranks, over the seconds of DDP."""

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Model and batch."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    grain: int
    vocabulary: int = 0  # of inputs and targets that are tokens

    def batch(self) -> Batch:
        """Return random inputs and targets, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        if self.vocabulary:
            size = (self.inputs[0], self.inputs[1] + 1)
            tokens = torch.randint(self.vocabulary, size, generator=generator)
            return tokens[:, :-1], tokens[:, 1:]
        inputs = torch.rand(self.inputs, generator=generator)
        return inputs, torch.randint(10, self.inputs[:1], generator=generator)

    def objective(self) -> Objective:
        """Return the mean loss, in grains."""
        losses = token_cross_entropy if self.vocabulary else cross_entropy
        return Objective(losses, Mean(), grain=self.grain)


CASES = {
    "MLP 784-512-512-10, B=256, grain 32": Case(
        make=partial(mlp, [784], [512, 512]), inputs=(256, 784), grain=32
    ),
    "CNN 32-64-128-10, B=256, grain 32": Case(make=cnn, inputs=(256, 1, 28, 28), grain=32),
    "GPT d=256, 4 layers, T=64, B=64, grain 8": Case(
        make=partial(gpt, 256, 256, 4, 4, 64), inputs=(64, 64), vocabulary=256, grain=8
    ),
}


def sum_gathered(
    nodes: Sequence[Node[list[Tensor]]],
    runs: Sequence[GrainRange],
    like: Sequence[Tensor],
    group: Any,
) -> list[Tensor]:
    """Sum like `pairwise_sum.sum_over_ranks`, but with all nodes on every rank."""
    if group is None:
        return pairwise_sum.sum_nodes(nodes, pairwise_sum.add_lists)
    nodes_by_rank = [pairwise_sum.list_nodes(run) for run in runs]
    sizes = [t.numel() for t in like]
    flat = like[0].new_zeros(max(map(len, nodes_by_rank)), sum(sizes))
    for row, node in zip(flat, nodes, strict=False):
        torch.cat([t.reshape(-1) for t in node.value], out=row)
    rows_by_rank = [torch.empty_like(flat) for _ in nodes_by_rank]
    dist.all_gather(rows_by_rank, flat, group)
    rows = [
        Node(shape.first, shape.level, row)
        for shapes, node_rows in zip(nodes_by_rank, rows_by_rank, strict=True)
        for shape, row in zip(shapes, node_rows, strict=False)
    ]
    parts = torch.split(pairwise_sum.sum_nodes(rows, Tensor.add_), sizes)
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def build_steps(case: Case, group: Any) -> tuple[nn.Module, nn.Module, dict[str, Step]]:
    """Return the model, that of DDP, and every way to compute the step."""
    torch.manual_seed(1)
    model = case.make()
    other = copy.deepcopy(model)
    batch, objective = case.batch(), case.objective()
    share = share_evenly(group)(len(batch[0]))
    share_batch = tuple(column[share] for column in batch)
    wrapped = other if group is None else DistributedDataParallel(other, process_group=group)

    def ddp() -> None:
        other.zero_grad()
        F.cross_entropy(wrapped(share_batch[0]).flatten(0, -2), share_batch[1].flatten()).backward()

    def ours(**how: Any) -> Step:
        return lambda: batch_gradient(model, objective, share_batch, group=group, **how)

    def other_design() -> None:
        with (
            mock.patch.object(TreeAccumulator, "backward_passes", Accumulator.backward_passes),
            mock.patch.object(pairwise_sum, "sum_over_ranks", sum_gathered),
        ):
            batch_gradient(model, objective, share_batch, group=group, bitwise=True)

    in_grains = Layout(case.grain)
    return (
        model,
        other,
        {
            "unobserved": ours(),
            "grains": ours(layout=in_grains),
            "bitwise": ours(bitwise=True),
            "gathered": other_design,
            "DDP": ddp,
        },
    )


def hash_gradient(model: nn.Module) -> str:
    """Return the SHA-256 of the gradient."""
    digest = hashlib.sha256()
    for p in model.parameters():
        assert p.grad is not None
        digest.update(p.grad.numpy().tobytes())
    return digest.hexdigest()


def time_steps(
    steps: dict[str, Step],
    group: Any,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each step in each round; all ranks have the same rounds."""

    def synchronize() -> None:
        if group is not None:
            dist.barrier(group)

    times: dict[str, list[float]] = {name: [] for name in steps}
    beginning, rounds, goes_on = time.perf_counter(), 0, True
    while goes_on:
        for name, step in steps.items():
            synchronize()
            start = clock()
            step()
            synchronize()
            times[name].append(clock() - start)
        rounds += 1
        is_over = time.perf_counter() - beginning > seconds and rounds >= 5
        goes_on = distributed.all_reduce_max(int(not is_over), group) == 1
    return times


def measure_rank(name: str, seconds: float, group: Any) -> bytes:
    """Return, pickled: the seconds and a hash of each way of a case, as this rank sees them."""
    torch.set_num_threads(1)
    kernels.use("torch")
    model, other, steps = build_steps(CASES[name], group)
    hashes = {}
    for way, step in steps.items():  # and warm up
        step()
        step()
        hashes[way] = hash_gradient(other if way == "DDP" else model)
    return pickle.dumps((time_steps(steps, group, seconds), hashes))


def compare(name: str, seconds: float) -> dict[str, Any]:
    """Measure a case, by number of ranks."""
    result: dict[str, Any] = {}
    hashes: dict[str, set[str]] = {}
    for world in WORLDS:
        work = partial(measure_rank, name, seconds)
        outputs = [work(None)] if world == 1 else launch(work, world, imports=["bitwise"])
        times, digests = pickle.loads(outputs[0])
        for way, digest in digests.items():
            hashes.setdefault(way, set()).add(digest)
        result[str(world)] = {
            "rounds": len(times["DDP"]),
            "milliseconds": {way: 1e3 * median(each) for way, each in times.items()},
            **{
                f"over {base}": {
                    way: median(a / b for a, b in zip(times[way], times[base], strict=True))
                    for way in times
                }
                for base in ("unobserved", "DDP")
            },
        }
    result["different bits"] = {way: len(digests) for way, digests in hashes.items()}
    assert len(hashes["bitwise"] | hashes["gathered"]) == 1, (
        "the bits depend on the number of ranks"
    )
    assert len(hashes["DDP"]) > 1, "DDP, the control, has the same bits at every number of ranks"
    return result


def show(name: str, result: dict[str, Any]) -> None:
    """Print a line for each way and number of ranks."""
    print(f"{name}; aim: bitwise {AIMS[name[:3]]} of DDP")
    for world in map(str, WORLDS):
        for way, ms in result[world]["milliseconds"].items():
            over = [f"{result[world][f'over {base}'][way]:6.3f}" for base in ("unobserved", "DDP")]
            print(
                f"  {world} ranks  {way:11}{ms:9.2f} ms, of unobserved {over[0]}, of DDP {over[1]}"
            )
    print(f"  different bits over ranks: {result['different bits']}", flush=True)


def format_tables(bitwise: dict[str, Any]) -> dict[str, str]:
    """Format the table of docs/performance.md."""
    rows = []
    for name, result in bitwise["cases"].items():
        aim, two, four = AIMS[name[:3]], result["2"]["over DDP"], result["4"]["over DDP"]
        ratios = [format_ratio(each["bitwise"], aim) for each in (two, four)]
        others = [format_ratio(each["gathered"]) for each in (two, four)]
        alone = format_ratio(result["1"]["over unobserved"]["bitwise"])
        rows.append([name, alone, *ratios, f"{aim:.2f}", *others])
    head = ("network", "over our step, 1 rank", "over DDP, 2 ranks", "4 ranks", "aim")
    return {"bitwise": format_table((*head, "other design: 2 ranks", "4 ranks"), rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the table")
    parser.add_argument(
        "--seconds", type=float, default=15, help="for each case and number of ranks"
    )
    args = parser.parse_args()
    results = {}
    for name in CASES:
        results[name] = compare(name, args.seconds)
        show(name, results[name])
    if args.write:
        print(write_result("bitwise", {"cases": results}))


if __name__ == "__main__":
    main()
