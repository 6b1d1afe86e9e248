"""How fast updates are on this machine, and what they hold in memory, by micro-batch.

    seconds(B) = min over m <= B of ceil(B / m) g(m)  +  o

g(m) seconds to read m examples and to compute their gradient, o those of the optimiser's step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from anybatch.advice.measure import drawn
from anybatch.gradient import batch_gradient
from anybatch.gradient.auto_micro_batch import PeakBytes, memory_available
from anybatch.recipe.build import Built
from anybatch.training.evaluation import device_of

__all__ = ["Speed", "best_micro_batch", "optimizer_seconds", "speeds", "update_seconds"]

MOST = 4096  # examples at once that are tried
_SLOWEST_SECONDS = 2.0  # of a pass; a larger one would not be much faster by example
_TIMED_SECONDS, _TIMES = 0.2, 3  # at least, of the passes of one size


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of passes of one micro-batch."""

    micro_batch: int
    seconds: float  # of one pass: reading, forward and back; the median of some
    peak_bytes: int  # that its tensors hold at their height, the gradient included

    @property
    def examples_per_second(self) -> float:
        """Throughput."""
        return self.micro_batch / self.seconds


def speeds(built: Built) -> Iterator[Speed]:
    """Powers of two and the full data set, until memory, `MOST` or patience are at an end."""
    device, num_examples = device_of(built.model), len(built.parts.train)
    powers = [2**k for k in range(MOST.bit_length()) if 2**k < num_examples]
    for size in [*powers, num_examples]:
        if size > MOST:
            return
        try:
            found = _speed(built, size, device)
        except torch.OutOfMemoryError:
            return
        yield found
        is_full = device.type == "cpu" and 2 * found.peak_bytes > memory_available() // 2
        if is_full or found.seconds > _SLOWEST_SECONDS:
            return


def optimizer_seconds(built: Built) -> float:
    """Of the optimiser's step, at a rate of 0; its state is no longer good for training."""
    for group in built.optimizer.param_groups:
        group["lr"] = 0.0
    return _timed(built.optimizer.step, device_of(built.model))


def best_micro_batch(found: Sequence[Speed], batch: int) -> Speed:
    """The one that passes a batch of that size the fastest."""
    fitting = [speed for speed in found if speed.micro_batch <= batch]
    return min(fitting, key=lambda speed: _passes(batch, speed) * speed.seconds)


def update_seconds(found: Sequence[Speed], optimizer: float, batch: int) -> float:
    """Of an update with batches of some size."""
    best = best_micro_batch(found, batch)
    return _passes(batch, best) * best.seconds + optimizer


def _passes(batch: int, speed: Speed) -> int:
    return -(-batch // speed.micro_batch)


def _speed(built: Built, size: int, device: torch.device) -> Speed:
    def once() -> object:
        batch = next(read)
        return batch_gradient(
            built.model,
            built.objective,
            batch.examples,
            key=batch.key,
            precision=built.recipe.run.precision,
        )

    read = drawn(built, size, None, step=0)
    with PeakBytes() as memory:
        once()
    return Speed(micro_batch=size, seconds=_timed(once, device), peak_bytes=memory.peak)


def _timed(once: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a few calls."""
    once()
    taken: list[float] = []
    while len(taken) < _TIMES or sum(taken) < _TIMED_SECONDS:
        begun = time.perf_counter()
        once()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return median(taken)
