"""Measure how fast updates are on this machine, and how much memory they take, by micro-batch.

    seconds(B) = min over m <= B of ceil(B / m) g(m)  +  o

g(m) seconds to read m examples and to compute their gradient, o those of the optimiser's step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from anybatch.advice.measure import draw_batches
from anybatch.gradient.auto_micro_batch import PeakBytes, count_free_bytes
from anybatch.recipe.build import Setup
from anybatch.training.evaluation import find_device

__all__ = ["Speed", "choose_micro_batch", "measure_optimizer", "measure_speeds", "predict_seconds"]

MAX_MICRO_BATCH = 4096  # examples
_MAX_SECONDS = 2.0  # of a pass; a larger one would hardly be faster per example
_MIN_SECONDS, _MIN_PASSES = 0.2, 3  # to time passes of one size


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Time and memory of passes of one micro-batch."""

    micro_batch: int
    seconds: float  # of one pass: reading, forward and backward; a median
    peak_bytes: int  # of its tensors, the gradient included

    @property
    def examples_per_second(self) -> float:
        """Throughput."""
        return self.micro_batch / self.seconds


def measure_speeds(setup: Setup) -> Iterator[Speed]:
    """Measure powers of two and the full data set, until time, memory or the largest size end."""
    device, num_examples = find_device(setup.model), len(setup.splits.train)
    powers = [2**k for k in range(MAX_MICRO_BATCH.bit_length()) if 2**k < num_examples]
    for size in [*powers, num_examples]:
        if size > MAX_MICRO_BATCH:
            return
        try:
            speed = _measure_speed(setup, size, device)
        except torch.OutOfMemoryError:
            return
        yield speed
        is_full = device.type == "cpu" and 2 * speed.peak_bytes > count_free_bytes() // 2
        if is_full or speed.seconds > _MAX_SECONDS:
            return


def measure_optimizer(setup: Setup) -> float:
    """Measure the seconds of the optimiser's step, at a rate of 0.

    Do not train with the optimiser afterwards: its state has changed.
    """
    for group in setup.optimizer.param_groups:
        group["lr"] = 0.0
    return _time(setup.optimizer.step, find_device(setup.model))


def choose_micro_batch(speeds: Sequence[Speed], batch: int) -> Speed:
    """Choose the micro-batch by which a batch takes the least time."""
    fitting = [speed for speed in speeds if speed.micro_batch <= batch]
    return min(fitting, key=lambda speed: _count_passes(batch, speed) * speed.seconds)


def predict_seconds(speeds: Sequence[Speed], optimizer: float, batch: int) -> float:
    """Predict the seconds of an update, from the seconds of the optimiser's step."""
    best = choose_micro_batch(speeds, batch)
    return _count_passes(batch, best) * best.seconds + optimizer


def _count_passes(batch: int, speed: Speed) -> int:
    return -(-batch // speed.micro_batch)


def _measure_speed(setup: Setup, size: int, device: torch.device) -> Speed:
    sample = draw_batches(setup, size, None, step=0)

    def make_pass() -> object:
        batch = next(sample)
        return setup.compute_gradient(batch.examples, key=batch.key)

    with PeakBytes() as memory:
        make_pass()
    return Speed(micro_batch=size, seconds=_time(make_pass, device), peak_bytes=memory.peak)


def _time(function: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a few calls, after one that is not timed."""
    function()
    seconds: list[float] = []
    while len(seconds) < _MIN_PASSES or sum(seconds) < _MIN_SECONDS:
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds)
