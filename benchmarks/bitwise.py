"""What it costs that the bits of a gradient do not depend on the number of ranks.

Every way of making the gradient of a batch is timed once a round, in turn (A B A B ...), by the
first rank, from one barrier to the next; ratios are taken round by round, and their median is
reported. Ranks are processes of this machine over gloo, with one thread each:

    unobserved   anybatch.batch_gradient by torch's own kernels, a rank's share at once
    grains       the same in micro-batches of a grain: what smaller passes cost
    bitwise      grain by grain, in the fixed tree: all_to_all of slices, all_gather of sums
    gathered     the same by the other design: every rank gets every node after its last pass, and
                 adds up all itself
    DDP          PyTorch: DistributedDataParallel, forward, mean loss, backward

The bits of `bitwise` and `gathered` are the same at every number of ranks, which is seen to here,
as is that those of DDP are not.

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
from anybatch.gradient.accumulate import Accumulator, TreeAccumulator
from anybatch.gradient.pairwise_sum import Node
from anybatch.kernels import choice as kernels
from anybatch.layout import GrainRange, Layout
from anybatch.objective import Objective
from anybatch.reductions import Mean
from anybatch.training.launch import launch
from anybatch.training.shares import evenly
from anybatch.zoo import gpt, mlp
from anybatch.zoo.losses import cross_entropy, token_cross_entropy
from machine import write
from observed_models import cnn

WORLDS = (1, 2, 4)
AIM = 1.15
"""Of DDP's seconds."""

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its batch."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    grain: int
    vocabulary: int = 0  # of inputs and targets that are tokens

    def batch(self) -> Batch:
        """Random inputs and targets, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        if self.vocabulary:
            size = (self.inputs[0], self.inputs[1] + 1)
            tokens = torch.randint(self.vocabulary, size, generator=generator)
            return tokens[:, :-1], tokens[:, 1:]
        inputs = torch.rand(self.inputs, generator=generator)
        return inputs, torch.randint(10, self.inputs[:1], generator=generator)

    def objective(self) -> Objective:
        """The mean loss, in grains."""
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


def gathered(
    nodes: Sequence[Node[list[Tensor]]],
    runs: Sequence[GrainRange],
    like: Sequence[Tensor],
    group: Any,
) -> list[Tensor]:
    """The other design: as `tree.sum_over_ranks`, every rank adding up all nodes."""
    if group is None:
        return pairwise_sum.sum_nodes(nodes, pairwise_sum.add_lists)
    held = [pairwise_sum.list_nodes(run) for run in runs]
    sizes = [t.numel() for t in like]
    flat = like[0].new_zeros(max(map(len, held)), sum(sizes))
    for row, node in zip(flat, nodes, strict=False):
        torch.cat([t.reshape(-1) for t in node.value], out=row)
    told = [torch.empty_like(flat) for _ in held]
    dist.all_gather(told, flat, group)
    rows = [
        Node(shape.first, shape.level, row)
        for rank, its in zip(held, told, strict=True)
        for shape, row in zip(rank, its, strict=False)
    ]
    parts = torch.split(pairwise_sum.sum_nodes(rows, Tensor.add_), sizes)
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def steps_of(case: Case, group: Any) -> tuple[nn.Module, nn.Module, dict[str, Step]]:
    """The model, that of DDP, and every way of making the step."""
    torch.manual_seed(1)
    model = case.make()
    other = copy.deepcopy(model)
    batch, objective = case.batch(), case.objective()
    share = evenly(group)(len(batch[0]))
    own = tuple(column[share] for column in batch)
    wrapped = other if group is None else DistributedDataParallel(other, process_group=group)

    def ddp() -> None:
        other.zero_grad()
        F.cross_entropy(wrapped(own[0]).flatten(0, -2), own[1].flatten()).backward()

    def ours(**how: Any) -> Step:
        return lambda: batch_gradient(model, objective, own, group=group, **how)

    def other_design() -> None:
        with (
            mock.patch.object(TreeAccumulator, "backward_passes", Accumulator.backward_passes),
            mock.patch.object(pairwise_sum, "sum_over_ranks", gathered),
        ):
            batch_gradient(model, objective, own, group=group, bitwise=True)

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


def bits(model: nn.Module) -> str:
    """SHA-256 of the gradient."""
    found = hashlib.sha256()
    for p in model.parameters():
        assert p.grad is not None
        found.update(p.grad.numpy().tobytes())
    return found.hexdigest()


def timed(steps: dict[str, Step], group: Any, seconds: float) -> dict[str, list[float]]:
    """Seconds of each step, round by round, the same number of rounds on every rank."""

    def meet() -> None:
        if group is not None:
            dist.barrier(group)

    found: dict[str, list[float]] = {name: [] for name in steps}
    begun, goes_on = time.perf_counter(), True
    while goes_on:
        for name, step in steps.items():
            meet()
            start = time.perf_counter()
            step()
            meet()
            found[name].append(time.perf_counter() - start)
        is_over = time.perf_counter() - begun > seconds and len(found["DDP"]) >= 5
        goes_on = distributed.largest(int(not is_over), group) == 1
    return found


def measured(name: str, seconds: float, group: Any) -> bytes:
    """What a rank has seen of a case: seconds, and the bits of each way; by plain pickle."""
    torch.set_num_threads(1)
    kernels.use("torch")
    model, other, steps = steps_of(CASES[name], group)
    seen = {}
    for way, step in steps.items():  # and warm up
        step()
        step()
        seen[way] = bits(other if way == "DDP" else model)
    return pickle.dumps((timed(steps, group, seconds), seen))


def compare(name: str, seconds: float) -> dict[str, Any]:
    """All that is measured of a case, by number of ranks."""
    found: dict[str, Any] = {}
    seen: dict[str, set[str]] = {}
    for world in WORLDS:
        work = partial(measured, name, seconds)
        told = [work(None)] if world == 1 else launch(work, world, imports=["bitwise"])
        times, digests = pickle.loads(told[0])
        for way, digest in digests.items():
            seen.setdefault(way, set()).add(digest)
        found[str(world)] = {
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
    found["different bits"] = {way: len(digests) for way, digests in seen.items()}
    assert len(seen["bitwise"] | seen["gathered"]) == 1, "bitwise is not"
    assert len(seen["DDP"]) > 1, "the control has failed to fail"
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """A line for each way and number of ranks."""
    print(f"{name}; aim: bitwise {AIM} of DDP")
    for world in map(str, WORLDS):
        for way, ms in found[world]["milliseconds"].items():
            over = [f"{found[world][f'over {base}'][way]:6.3f}" for base in ("unobserved", "DDP")]
            print(
                f"  {world} ranks  {way:11}{ms:9.2f} ms, of unobserved {over[0]}, of DDP {over[1]}"
            )
    print(f"  different bits over ranks: {found['different bits']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    parser.add_argument("--seconds", type=float, default=15, help="for each case and rank number")
    args = parser.parse_args()
    results = {}
    for name in CASES:
        results[name] = compare(name, args.seconds)
        show(name, results[name])
    if args.write:
        print(write("bitwise", {"aim": AIM, "cases": results}))


if __name__ == "__main__":
    main()
