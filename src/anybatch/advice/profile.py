"""Find where the time of an update goes.

    seconds of an update  =  median over updates that nothing watches
    share of a phase      =  samples of the stack in it / all samples
    operators             =  seconds within torch's operators, from torch's own profiler

A thread looks at the stack of the loop every millisecond. The innermost function of a phase that
is on the stack decides.
"""

import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from torch.profiler import ProfilerActivity, profile

from anybatch.recipe.build import Setup
from anybatch.runs import Run
from anybatch.training import Step

__all__ = ["PHASES", "Operator", "Profile", "measure_profile"]

Stack = tuple[str, ...]
"""Functions from the outermost to the innermost."""

PHASES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "reading data": (("training/loop.py", "read"),),
    "forward pass": (("gradient/passes.py", "run_forward"),),
    "backward pass": (("gradient/passes.py", "run_backward"),),
    "ledger": (("ledger/", ""), ("gradient/observed.py", "")),
    "optimiser": (("runs/state.py", "update"),),
    "records": (
        ("runs/run_files.py", "record"),
        ("runs/run_files.py", "record_update"),
        ("runs/run.py", "record"),
        ("runs/run_files.py", "add_to_ledger"),
        ("training/step.py", "make_row"),
    ),
    "checkpoints": (("runs/run_files.py", "write_checkpoint"), ("runs/state.py", "dump")),
}
"""Files and functions of each phase; "": all of the file. What is in none is Python around it."""

OTHER = "Python around these"

_LOOP = "training/loop.py:make_updates"
_INTERVAL = 0.001  # seconds between two looks at the stack
_WARM_UP = 20  # updates before anything is measured: the ledger confirms its first 16
_TRACED = 10  # updates under torch's profiler, which slows them
_PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Operator:
    """Operator of torch, such as aten::addmm."""

    name: str
    seconds: float  # of an update, without the operators that it calls
    calls: float  # in an update


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Time of an update, and where it goes."""

    seconds: float  # of an update; a median
    phases: Mapping[str, float]  # share of each, the largest first
    operators: list[Operator]  # the slowest first
    stacks: Mapping[Stack, int]  # samples
    num_updates: int

    @property
    def operator_share(self) -> float:
        """Share of the time that torch's operators take."""
        return min(sum(operator.seconds for operator in self.operators) / self.seconds, 1.0)


def measure_profile(setup: Setup, num_updates: int) -> Profile:
    """Train a recipe for some updates in a temporary run, and measure them.

    Args:
        setup: what to train; its weights change.
        num_updates: updates to time, and as many to sample.
    """
    setup.model.train()
    with tempfile.TemporaryDirectory() as folder, closing(Run(Path(folder) / "run")) as run:
        total = _WARM_UP + 2 * num_updates + _TRACED
        steps = setup.make_steps(run=run, steps=total)
        seconds = _time_updates(steps, num_updates)
        stacks: Counter[Stack] = Counter()
        with _sample_stacks(stacks):
            count = sum(1 for _ in zip(range(num_updates), steps, strict=False))
        operators = _trace_operators(steps)
    return Profile(
        seconds=median(seconds),
        phases=_find_shares(stacks),
        operators=operators,
        stacks=stacks,
        num_updates=len(seconds) + count,
    )


def _time_updates(steps: Iterator[Step], num_updates: int) -> list[float]:
    """Return the seconds of updates after a warm-up."""
    seconds: list[float] = []
    start = time.perf_counter()
    for number, _ in enumerate(steps):
        now = time.perf_counter()
        seconds.append(now - start)
        if number + 1 == _WARM_UP + num_updates:
            break
        start = time.perf_counter()
    return seconds[_WARM_UP:]


@contextmanager
def _sample_stacks(stacks: Counter[Stack]) -> Iterator[None]:
    """Count the stacks of this thread that another thread sees every millisecond."""
    watched, is_over = threading.get_ident(), threading.Event()

    def sample() -> None:
        while not is_over.wait(_INTERVAL):
            stack = _read_stack(sys._current_frames().get(watched))
            if stack and stack[0] == _LOOP:
                stacks[stack] += 1

    thread, interval = threading.Thread(target=sample, daemon=True), sys.getswitchinterval()
    sys.setswitchinterval(_INTERVAL / 2)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)


def _read_stack(frame: FrameType | None) -> Stack:
    """Read the functions on a stack, from the loop of the updates inwards."""
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{_shorten(code.co_filename)}:{code.co_name}")
        if names[-1] == _LOOP:
            break
        frame = frame.f_back
    return tuple(reversed(names))


def _shorten(file: str) -> str:
    """Return a file's path inside its package."""
    if file.startswith(_PACKAGE):
        return file.removeprefix(_PACKAGE).lstrip("/\\").replace("\\", "/")
    return "/".join(Path(file).parts[-2:])


def _find_phase(stack: Stack) -> str:
    """Return the phase of the innermost function that belongs to one."""
    for function in reversed(stack):
        file, _, name = function.rpartition(":")
        for phase, places in PHASES.items():
            if any(file.startswith(f) and name == (n or name) for f, n in places):
                return phase
    return OTHER


def _find_shares(stacks: Mapping[Stack, int]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[_find_phase(stack)] += count
    total = max(counts.total(), 1)
    return {phase: count / total for phase, count in counts.most_common()}


def _trace_operators(steps: Iterator[Step]) -> list[Operator]:
    """Measure the operators of a few updates by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        count = sum(1 for _ in zip(range(_TRACED), steps, strict=False))
    rows: list[Any] = list(trace.key_averages()) if count else []
    operators = [
        Operator(row.key, row.self_cpu_time_total / 1e6 / count, row.count / count)
        for row in rows
        if row.key.startswith("aten::")
    ]
    return sorted(operators, key=lambda operator: -operator.seconds)
