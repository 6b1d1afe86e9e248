"""Measure what else costs time or memory: a second pass, the start, the memory of a step, a recipe.

    passes   `TopFraction(0.1)`, which takes two passes, over the same gradient of a `Mean`
    start    `anybatch train lenet-digits` until its first update, over scripts in PyTorch
    memory   peak of resident memory in 10 steps, above that before the first, over steps by hand
    recipe   an update of `anybatch train`, as the difference of two lengths, over one by hand

Ways take turns (A B A B), and a result is the median of the ratios in each round. Seconds are those
of the processor, which other programs change less than those of the clock. All but `passes` start
processes of their own.

    python benchmarks/cost.py [--only NAME ...] [--write]     # also the tables of the page
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import anybatch as ab
from anybatch.zoo import lenet, mlp
from anybatch.zoo.losses import cross_entropy
from loop import loop_by_hand, time_step
from observed_models import CASES
from observed_step import NORMS, NUM_CONFIRMED, build_plain, median_ratio, time_steps
from performance import write_result
from tables import format_ratio, format_seconds, format_table

Result = dict[str, Any]
AIMS = {"passes": 0.7, "start": 1.2, "steps": 1.05, "observed": 1.1, "recipe": 1.0}
NUM_STEPS, BATCH, EPOCHS = 10, 64, (1, 4)  # steps of `memory`; batch and lengths of `recipe`

STOP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
def stop(*_):
    print(*(name for name in sys.modules if name.startswith("anybatch")), flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
"""
COMMAND = """
from anybatch.cli import main
main(["train", "lenet-digits", "--out", sys.argv[1]])
"""
BY_HAND = """
import torch, torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
torch.manual_seed(0)
images, classes = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
model = nn.Sequential(
    nn.Conv2d(1, 20, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5, padding=2),
    nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 500), nn.ReLU(), nn.Linear(500, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
F.cross_entropy(model(x[:64]), y[:64]).backward()
optimizer.step()
"""
RECIPE = f"""
[model]
name = "mlp"
args = {{ inputs = [784], hidden = [128] }}

[data]
name = "npz"
args = {{ path = "data.npz", inputs = "x", targets = "y" }}

[objective]
loss = "cross_entropy"

[optimizer]
name = "sgd"
lr = 0.01
args = {{ momentum = 0.9 }}

[batch]
size = {BATCH}

[run]
epochs = 1
threads = 1
"""


def run_process(*words: str) -> tuple[float, str]:
    """Run Python with these words; return the seconds of the processor, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, ended.stdout


def measure_passes(rounds: int) -> Result:
    """Time gradients of a mean and of a top fraction, whole and in 8 micro-batches."""
    torch.manual_seed(0)
    labels = torch.randint(10, (256,))
    cases = {
        "784-512-512-10, B=256": (mlp([784], [512, 512]), (torch.rand(256, 784), labels)),
        "LeNet 28x28, B=128": (lenet(28), (torch.rand(128, 1, 28, 28), labels[:128])),
    }
    results = {}
    for name, (model, batch) in cases.items():
        steps: dict[str, Callable[[], object]] = {}
        for pieces in (1, 8):
            layout = ab.Layout(len(batch[1]) // pieces)
            for way, reduction in (("mean", ab.Mean()), ("top", ab.TopFraction(0.1))):
                objective = ab.Objective(cross_entropy, reduction)
                steps[f"{way} in {pieces}"] = partial(
                    ab.batch_gradient, model, objective, batch, layout=layout
                )
        for step in steps.values():  # the library checks the first cut updates
            for _ in range(NUM_CONFIRMED):
                step()
        times = time_steps(steps, time.process_time, 0, least=3 * rounds)
        results[name] = {
            "seconds": {way: median(each) for way, each in times.items()},
            "ratios": {n: median_ratio(times, f"top in {n}", f"mean in {n}") for n in (1, 8)},
        }
    return results


def format_passes(passes: Result) -> str:
    """Format the table of second passes."""
    rows = []
    for name, result in passes["cases"].items():
        aims = {"1": None, "8": AIMS["passes"]}
        cells = [format_seconds(seconds) for seconds in result["seconds"].values()]
        ratios = [format_ratio(result["ratios"][n], aim) for n, aim in aims.items()]
        rows.append([name, *cells[:2], ratios[0], *cells[2:], ratios[1], f"{aims['8']:.2f}"])
    head = (
        "network",
        "mean",
        "top tenth",
        "ratio",
        "mean, in 8",
        "top tenth, in 8",
        "ratio",
        "aim",
    )
    return format_table(head, rows)


def measure_start(rounds: int) -> Result:
    """Time new processes until their first update."""
    times: dict[str, list[float]] = {"command": [], "same imports": [], "by hand": []}
    with tempfile.TemporaryDirectory() as folder:
        names = run_process("-c", STOP + COMMAND, f"{folder}/first")[1]
        imports = f"from importlib import import_module\nfor name in {names.split()}:\n"
        imports += "    import_module(name)\n"
        scripts = dict(zip(times, (COMMAND, imports + BY_HAND, BY_HAND), strict=True))
        for i in range(rounds + 1):
            for way, script in scripts.items():
                times[way].append(run_process("-c", STOP + script, f"{folder}/{i}")[0])
    times = {way: each[1:] for way, each in times.items()}  # the first round reads the files
    return {
        "lenet-digits": {
            "seconds": {way: median(each) for way, each in times.items()},
            "ratios": {way: median_ratio(times, "command", way) for way in times},
            "rounds": times,
        }
    }


def format_start(start: Result) -> str:
    """Format the table of the start."""
    rows = []
    for name, result in start["cases"].items():
        cells = [f"{seconds:.2f} s" for seconds in result["seconds"].values()]
        ratios = result["ratios"]
        cells.append(format_ratio(ratios["same imports"], AIMS["start"]))
        rows.append([name, *cells, f"{AIMS['start']:.2f}", format_ratio(ratios["by hand"])])
    head = ("recipe", "`anybatch train`", "script with the same imports", "script in PyTorch alone")
    return format_table((*head, "over the same imports", "aim", "over PyTorch alone"), rows)


def read_status(field: str) -> int:
    """Read a number of KiB from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def build_loop(way: str, model: nn.Module, batch: Any, losses: Any, run: Path) -> Iterator[Any]:
    """Build a training by one way, which takes the same batch at each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if way == "by hand":
        step = build_plain(model, batch)
        return ((step(), optimizer.step()) for _ in count())
    size = len(batch[1])
    how: dict[str, Any] = {
        "order": ab.Order(size, batch_size=size, seed=0),
        "run": ab.Run(run, checkpoint_every=10**9),
    }
    observe = ab.Observe(**NORMS) if way == "observed" else None
    objective = ab.Objective(losses)
    return ab.steps(model, objective, optimizer, batch, **how, observe=observe, epochs=10**6)


def measure_peak(name: str, way: str) -> int:
    """Return by how many KiB resident memory grows at most in some steps, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    model, batch = case.make(), case.batch()
    with tempfile.TemporaryDirectory() as folder:
        small = torch.rand(2, 4), torch.tensor([0, 1])
        warm = build_loop(way, nn.Linear(4, 2), small, cross_entropy, Path(folder) / "warm")
        for _ in range(2):  # import what first steps import
            next(warm)
        loop = build_loop(way, model, batch, case.losses, Path(folder) / "run")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        before = read_status("VmRSS")
        for _ in range(NUM_STEPS):
            next(loop)
        return read_status("VmHWM") - before


def measure_memory(rounds: int) -> Result:
    """Measure the peak of each way in processes of their own."""
    results = {}
    for name in (name for name in CASES if name.startswith(("MLP", "CNN", "GPT d=256"))):
        peaks: dict[str, list[float]] = {"by hand": [], "steps": [], "observed": []}
        for _ in range(max(3, rounds // 2)):
            for way, each in peaks.items():
                each.append(float(run_process(__file__, "--peak", name, way)[1]))
        results[name] = {
            "kibibytes": {way: median(each) for way, each in peaks.items()},
            "ratios": {way: median_ratio(peaks, way, "by hand") for way in peaks},
            "rounds": peaks,
        }
    return results


def format_memory(memory: Result) -> str:
    """Format the table of memory."""
    rows = []
    for name, result in memory["cases"].items():
        cells = [f"{kib / 1024:,.1f} MiB" for kib in result["kibibytes"].values()]
        for way in ("steps", "observed"):
            cells += [format_ratio(result["ratios"][way], AIMS[way]), f"{AIMS[way]:.2f}"]
        rows.append([name, *cells])
    head = ("network", "by hand", "`ab.steps`", "observed", "`ab.steps` over by hand", "aim")
    return format_table((*head, "observed over by hand", "aim"), rows)


def measure_recipe(rounds: int) -> Result:
    """Time an update of a recipe, and of a loop by hand over the same data."""
    rng = np.random.default_rng(0)
    x, y = rng.random((60_000, 784), dtype=np.float32), rng.integers(10, size=60_000)
    num_train = 48_000  # without the fifth that is held out
    num_updates = num_train // BATCH * (EPOCHS[1] - EPOCHS[0])
    times: dict[str, list[float]] = {"by hand": [], "recipe": [], "compiled": []}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/data.npz", x=x, y=y)
        (Path(folder) / "recipe.toml").write_text(RECIPE.replace("data.npz", f"{folder}/data.npz"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        data = torch.from_numpy(x[:num_train]), torch.from_numpy(y[:num_train])
        loop = loop_by_hand(mlp([784], [128]), data, BATCH)
        for i in range(rounds + 1):
            times["by hand"].append(time_step(loop, num_updates, time.process_time))
            for way, compiled in (("recipe", "false"), ("compiled", "true")):
                short, long = (
                    run_process(
                        *("-m", "anybatch", "train", f"{folder}/recipe.toml", "--json"),
                        *("--out", f"{folder}/{way}-{i}-{epochs}"),
                        *("--set", f"run.epochs={epochs}", "--set", f"run.compile={compiled}"),
                    )[0]
                    for epochs in EPOCHS
                )
                times[way].append((long - short) / num_updates)
    times = {way: each[1:] for way, each in times.items()}  # the first round compiles
    return {
        "784-128-10, B=64": {
            "seconds": {way: median(each) for way, each in times.items()},
            "ratios": {way: median_ratio(times, way, "by hand") for way in times},
            "rounds": times,
        }
    }


def format_recipe(recipe: Result) -> str:
    """Format the table of a recipe."""
    rows = []
    for name, result in recipe["cases"].items():
        cells = [format_seconds(seconds) for seconds in result["seconds"].values()]
        ratios = (
            format_ratio(result["ratios"][way], AIMS["recipe"]) for way in ("recipe", "compiled")
        )
        rows.append([name, *cells, *ratios, f"{AIMS['recipe']:.2f}"])
    head = ("recipe", "by hand", "`anybatch train`", "`run.compile = true`", "over by hand")
    return format_table((*head, "compiled over by hand", "aim"), rows)


PARTS: dict[str, tuple[Callable[[int], Result], Callable[[Result], str]]] = {
    "passes": (measure_passes, format_passes),
    "start": (measure_start, format_start),
    "memory": (measure_memory, format_memory),
    "recipe": (measure_recipe, format_recipe),
}


def format_tables(passes: Result, start: Result, memory: Result, recipe: Result) -> dict[str, str]:
    """Format the tables of docs/performance.md."""
    raw = zip(PARTS.items(), (passes, start, memory, recipe), strict=True)
    return {name: make_table(result) for (name, (_, make_table)), result in raw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw results and the tables")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(measure_peak(*args.peak))
        return
    torch.set_num_threads(1)
    for name in args.only:
        measure, make_table = PARTS[name]
        result = json.loads(json.dumps({"cases": measure(args.rounds)}))
        print(make_table(result), flush=True)
        if args.write:
            print(write_result(f"cost_{name}", result))


if __name__ == "__main__":
    main()
