"""Random numbers as functions of (seed, step, grain) and of (seed, epoch, example).

    seed of a grain = hash(seed, step, grain)

Before each grain the global generators (torch on CPU and device, NumPy, `random`) are seeded with
it. So dropout in any form is the same in every layout, and after a resume.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anybatch.errors import ModelError

__all__ = ["DrawControl", "ExampleKey", "GeneratorStates", "Key", "hash_integers"]
__all__ += ["preserve_generators", "seed_generators"]

_CPU = torch.device("cpu")


def hash_integers(*numbers: int) -> int:
    """Hash integers to a 63-bit seed, the same on every machine."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True, slots=True)
class Key:
    """Origin of the random numbers of one update.

    Example:
        >>> key = Key(seed=0, step=3)
        >>> key.grain(0) == Key(0, 3).grain(0), key.grain(0) == key.grain(1)
        (True, False)
    """

    seed: int
    step: int

    def __post_init__(self) -> None:
        if type(self.seed) is int and type(self.step) is int:
            return
        numbers: tuple[object, ...] = self.seed, self.step
        if not all(isinstance(number, Integral) for number in numbers):
            raise ModelError(f"{self} is no key. Its seed and step must be integers.")

    def grain(self, index: int) -> int:
        """Return the seed of the grain of that index in the batch."""
        return hash_integers(self.seed, self.step, index)


@dataclass(frozen=True, slots=True)
class ExampleKey:
    """Origin of the random numbers of one visit of one example, such as its augmentation.

    Example:
        >>> key = ExampleKey(seed=0, epoch=1, id=42)
        >>> first, again = (torch.rand(1, generator=key.generator()) for _ in range(2))
        >>> bool(first == again)
        True
    """

    seed: int
    epoch: int
    id: int

    def generator(self) -> torch.Generator:
        """Return a torch generator for this visit."""
        return torch.Generator().manual_seed(hash_integers(self.seed, self.epoch, self.id))

    def numpy(self) -> np.random.Generator:
        """Return a NumPy generator for this visit."""
        return np.random.default_rng(hash_integers(self.seed, self.epoch, self.id))


def seed_generators(seed: int, device: torch.device = _CPU) -> None:
    """Seed the global generators of torch (on the CPU and the device), NumPy and `random`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)  # of this device only, as in `GeneratorStates`
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what models draw from
    random.seed(seed)


class GeneratorStates(NamedTuple):
    """States of the global generators, to detect draws and to restore them."""

    cpu: Tensor
    device: Tensor | None
    others: tuple[Any, ...] | None  # NumPy's and random's; None: not captured

    @classmethod
    def capture(cls, device: torch.device, *, others: bool) -> "GeneratorStates":
        """Read the current states; `others` includes NumPy's and random's (about 30 us)."""
        return cls(
            torch.default_generator.get_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            (_read_numpy_state(), random.getstate()) if others else None,
        )

    def has_changed(self, device: torch.device) -> bool:
        """Return whether random numbers have been drawn since."""
        if not torch.equal(self.cpu, torch.default_generator.get_state()):
            return True
        if self.others is not None and self.others != (_read_numpy_state(), random.getstate()):
            return True
        if self.device is None:
            return False
        return not torch.equal(self.device, torch.cuda.get_rng_state(device))

    def restore(self, device: torch.device) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        if self.others is not None:
            kind, keys, *rest = self.others[0]
            np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
            random.setstate(self.others[1])


class DrawControl(AbstractContextManager[None]):
    """Context that seeds the global generators, or without a seed refuses a block that draws.

    Args:
        others: whether draws from NumPy and `random` are detected too.
        error: raised if the block has drawn random numbers. The generators are then restored, as
            they are after any other error.
    """

    def __init__(
        self, device: torch.device, seed: int | None, *, others: bool, error: Exception
    ) -> None:
        self._device, self._seed, self._others, self._error = device, seed, others, error

    def __enter__(self) -> None:
        if self._seed is None:
            self._states = GeneratorStates.capture(self._device, others=self._others)
        else:
            seed_generators(self._seed, self._device)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._seed is not None:
            return
        if error is not None or self._states.has_changed(self._device):
            self._states.restore(self._device)
            if error is None:
                raise self._error


@contextmanager
def preserve_generators(device: torch.device) -> Iterator[None]:
    """Restore the global generators at the end of a block."""
    states = GeneratorStates.capture(device, others=True)
    try:
        yield
    finally:
        states.restore(device)


def _read_numpy_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return (kind, np.asarray(keys).tobytes(), *rest)
