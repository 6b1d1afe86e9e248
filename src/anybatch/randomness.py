"""Random numbers as functions of (seed, step, grain) and of (seed, epoch, example).

    seed of a grain = hash(seed, step, grain)

Before each grain the global generators (torch on CPU and device, NumPy, `random`) are
seeded with it, so that dropout in any form is the same in every layout, and after a resume.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anybatch.errors import ModelError

__all__ = ["ExampleKey", "Key", "States", "fold", "generators_restored", "seed_generators"]

_CPU = torch.device("cpu")


def fold(*numbers: int) -> int:
    """A 63-bit seed from any integers, the same on every machine."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True, slots=True)
class Key:
    """Where the random numbers of one update come from."""

    seed: int
    step: int

    def __post_init__(self) -> None:
        numbers: tuple[object, ...] = self.seed, self.step
        if not all(isinstance(number, Integral) for number in numbers):
            raise ModelError(f"{self} is no key. Its seed and step must be integers.")

    def grain(self, index: int) -> int:
        """Seed of the grain of that index in the batch."""
        return fold(self.seed, self.step, index)


@dataclass(frozen=True, slots=True)
class ExampleKey:
    """Where the random numbers of one visit of one example come from: its augmentation."""

    seed: int
    epoch: int
    id: int

    def generator(self) -> torch.Generator:
        """A torch generator of this visit's own."""
        return torch.Generator().manual_seed(fold(self.seed, self.epoch, self.id))

    def numpy(self) -> np.random.Generator:
        """A NumPy generator of this visit's own."""
        return np.random.default_rng(fold(self.seed, self.epoch, self.id))


def seed_generators(seed: int, device: torch.device = _CPU) -> None:
    """Seed the global generators of torch (on the CPU and the device), NumPy and `random`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)  # this device's alone: `States` knows no other
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what models draw from
    random.seed(seed)


class States(NamedTuple):
    """States of the global generators, to see whether anything was drawn and to go back."""

    cpu: Tensor
    device: Tensor | None
    others: tuple[Any, ...] | None  # NumPy's and random's, None where not watched

    @classmethod
    def now(cls, device: torch.device, *, others: bool) -> "States":
        """The states as they are; `others` includes NumPy's and random's (some 30 us)."""
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            (_numpy_state(), random.getstate()) if others else None,
        )

    def drawn(self, device: torch.device) -> bool:
        """Whether anything was drawn since."""
        if not torch.equal(self.cpu, torch.get_rng_state()):
            return True
        if self.others is not None and self.others != (_numpy_state(), random.getstate()):
            return True
        if self.device is None:
            return False
        return not torch.equal(self.device, torch.cuda.get_rng_state(device))

    def restore(self, device: torch.device) -> None:
        """Go back to these states."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        if self.others is not None:
            kind, keys, *rest = self.others[0]
            np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
            random.setstate(self.others[1])


@contextmanager
def generators_restored(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were found."""
    states = States.now(device, others=True)
    try:
        yield
    finally:
        states.restore(device)


def _numpy_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return (kind, np.asarray(keys).tobytes(), *rest)
