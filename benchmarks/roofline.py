"""Compare updates with the roofline of the machine: its arithmetic, and its memory.

    attainable seconds = max(F / peak, M / bandwidth),    share of the roof = attainable / measured

F counts the matrix products and convolutions of forward and backward, by torch's FlopCounterMode:
the LSTM as products, attention as whole matrices. M counts the bytes that an update moves if every
tensor is read or written once where the equations have it, and no cache holds anything from one of
these places to the next:

    parameters 4 x (read by forward and backward; read and written by the optimiser)
    gradients 2 x (written by backward, read by the optimiser), optimiser state 2 x
    activations 2 x: what forward saves for backward, except parameters and inputs
    inputs and targets: read by forward, and again by backward where it saves them

Temporary results, and weights that are read once a time step, are not in it. Peak is a product of
two matrices of 2,048 x 2,048 in float32, bandwidth a copy of 256 MiB, read and written. Both are
timed in turn with the updates (A B C D A B C D ...), and a share is the median of the shares in
each round. One thread on one core; seconds are its CPU seconds, so that other work on the machine
does not count.

Source: Williams, Waterman, Patterson 2009, Roofline, doi 10.1145/1498765.1498785.

    python benchmarks/roofline.py [--write]
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anybatch.zoo import gpt, lenet, mlp
from compiled import Case, Data, loop_by_hand, loop_by_steps
from loop import time_step
from machine import use_one_core
from observed_models import LastOutput
from performance import write_result
from svg import Axis, Series, find_ticks, plot
from tables import format_seconds, format_table

SIDE, COPY = 2048, 2**28  # of the matrices; bytes
PROBES, WAYS = ("product", "copy"), ("by hand", "steps")
CASES = {
    "784-128-10, B=64": Case(lambda: mlp([784], [128]), (6400, 784), batch=64, chunk=100),
    "LeNet 28x28, B=64": Case(lambda: lenet(28), (1280, 1, 28, 28), batch=64, chunk=10),
    "GPT d=256, 4 layers, T=128, B=16": Case(
        lambda: gpt(256, 256, 4, 4, 128), (160, 128), batch=16, chunk=1, vocabulary=256
    ),
    "LSTM 128-256, T=100, B=32": Case(LastOutput, (320, 100, 128), batch=32, chunk=2),
}


def run_update(model: nn.Module, batch: Data) -> torch.optim.Optimizer:
    """Make one update with SGD and momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten()).backward()
    optimizer.step()
    return optimizer


def count_flops(model: nn.Module, batch: Data) -> int:
    """Return F. LSTM and attention run as products, since torch counts no fused kernel of a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TF32 on GPUs that are not there
        with (
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            run_update(model, batch)
    return int(counter.get_total_flops())


def count_bytes(model: nn.Module, batch: Data) -> dict[str, int]:
    """Return the terms of M."""
    parameters = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    inputs = {leaf.untyped_storage().data_ptr(): leaf.nbytes for leaf in batch}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        optimizer = run_update(model, batch)
    states = [t for each in optimizer.state.values() for t in each.values() if t is not None]
    activations = saved.keys() - parameters.keys() - inputs.keys()
    return {
        "parameters": 4 * sum(parameters.values()),
        "gradients": 2 * sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimiser state": 2 * sum(state.nbytes for state in states),
        "activations": 2 * sum(saved[address] for address in activations),
        "inputs": sum(inputs.values()) + sum(inputs[each] for each in inputs.keys() & saved.keys()),
    }


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def time_case(case: Case, folder: Path, seconds: float) -> dict[str, list[float]]:
    """Return seconds of product, copy and a step of each loop, after one round to warm up."""
    torch.manual_seed(0)
    left, right, out = (torch.rand(SIDE, SIDE) for _ in range(3))
    source, target = torch.rand(COPY // 4), torch.zeros(COPY // 4)
    data = case.make_data()
    loops: dict[str, Iterator[Any]] = {
        "by hand": loop_by_hand(case, data),
        "steps": loop_by_steps(case, data, folder, compile=False),
    }
    rounds: list[dict[str, float]] = []
    beginning = time.perf_counter()
    while len(rounds) < 8 or time.perf_counter() - beginning < seconds:
        rounds.append(
            {
                "product": time_call(lambda: torch.mm(left, right, out=out)),
                "copy": time_call(lambda: target.copy_(source)),
                **{
                    way: time_step(loop, case.chunk, time.process_time)
                    for way, loop in loops.items()
                },
            }
        )
    loops["steps"].close()  # type: ignore[attr-defined]
    return {name: [each[name] for each in rounds[1:]] for name in rounds[0]}


def measure(seconds: float) -> dict[str, Any]:
    """Measure the machine and all networks."""
    times, cases = {}, {}
    with tempfile.TemporaryDirectory() as folder, use_one_core():
        for name, case in CASES.items():
            torch.manual_seed(0)
            data = case.make_data()
            batch = data[0][: case.batch].clone(), data[1][: case.batch].clone()
            cases[name] = {
                "flops": count_flops(case.make(), batch),
                "bytes": count_bytes(case.make(), batch),
            }
            times[name] = time_case(case, Path(folder) / str(len(times)), seconds)
    for name, case in cases.items():
        num_bytes = sum(case["bytes"].values())
        products, copies = times[name]["product"], times[name]["copy"]
        arithmetic = [case["flops"] / (2 * SIDE**3) * seconds for seconds in products]
        memory = [num_bytes / (2 * COPY) * seconds for seconds in copies]
        roof = list(map(max, arithmetic, memory))
        case |= {
            "intensity": case["flops"] / num_bytes,
            "roof": "memory" if median(memory) > median(arithmetic) else "arithmetic",
            "attainable_seconds": median(roof),
            "seconds": {way: median(times[name][way]) for way in WAYS},
            "share": {way: median(map(truediv, roof, times[name][way])) for way in WAYS},
            "rounds": times[name],
        }
    probes = {name: median(t for each in times.values() for t in each[name]) for name in PROBES}
    return {
        "peak_flops": 2 * SIDE**3 / probes["product"],
        "bandwidth": 2 * COPY / probes["copy"],
        "cases": cases,
    }


def format_tables(result: dict[str, Any]) -> dict[str, str]:
    """Format the tables of the document."""
    rows, bytes_rows = [], []
    for name, case in result["cases"].items():
        times = [case["attainable_seconds"], *(case["seconds"][way] for way in WAYS)]
        columns = [f"{case['flops'] / 1e6:,.0f}", f"{sum(case['bytes'].values()) / 1e6:,.1f}"]
        columns += [f"{case['intensity']:.1f}", case["roof"], *map(format_seconds, times)]
        rows.append([name, *columns, *(f"{case['share'][way]:.2f}" for way in WAYS)])
        bytes_rows.append([name, *(f"{each / 1e6:,.2f}" for each in case["bytes"].values())])
    head = ("network", "MFLOP", "MB", "FLOP a byte", "roof", "attainable", "by hand", "`ab.steps`")
    peak, bandwidth = result["peak_flops"] / 1e9, result["bandwidth"] / 1e9
    limits = [f"{peak:.0f} GFLOP/s", f"{bandwidth:.0f} GB/s", f"{peak / bandwidth:.1f} FLOP a byte"]
    terms = next(iter(result["cases"].values()))["bytes"]
    return {
        "roofline-limits": format_table(["arithmetic", "memory", "both limit at"], [limits]),
        "roofline": format_table([*head, "share by hand", "share of `ab.steps`"], rows),
        "roofline-bytes": format_table(["MB of", *terms], bytes_rows),
    }


def draw_plots(result: dict[str, Any]) -> dict[str, str]:
    """Draw the roof, and each network at its share of it: by hand and by `ab.steps`, as SVG."""
    peak, bandwidth = result["peak_flops"] / 1e9, result["bandwidth"] / 1e9
    x = Axis("FLOP a byte", [1, 10, 100, 1000], is_log=True)
    roof = [(1.0, bandwidth), (peak / bandwidth, peak), (1000.0, peak)]
    series = [Series("roof", roof, colour=6)]
    for colour, (name, case) in enumerate(result["cases"].items()):
        for way, hollow in (("by hand", False), ("steps", True)):
            label = f"{name.split(',')[0]}, {'ab.steps' if hollow else way}"
            height = case["share"][way] * min(peak, case["intensity"] * bandwidth)
            points = [(case["intensity"], height)]
            series.append(Series(label, points, colour, marks=True, line=False, hollow=hollow))
    title = f"Roofline of one core: {peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s"
    heights = [height for each in series for _, height in each.points]
    y = Axis("GFLOP a second", find_ticks(min(heights), peak), is_log=True)
    return {"roofline": plot(title, x, y, series)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write raw result, tables and plot")
    parser.add_argument("--seconds", type=float, default=20, help="for each network, or 8 rounds")
    args = parser.parse_args()
    result = measure(args.seconds)
    print(f"peak {result['peak_flops'] / 1e9:.1f} GFLOP/s, {result['bandwidth'] / 1e9:.1f} GB/s")
    print(*format_tables(result).values(), sep="\n")
    if args.write:
        print(write_result("roofline", result))


if __name__ == "__main__":
    main()
