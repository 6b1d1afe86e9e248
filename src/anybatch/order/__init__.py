"""Which examples make up step t.

Positions p = 0, 1, 2, ... run on through all epochs, and each epoch is a permutation
of its own:

    p = e N + i,   0 <= i < N             position i of epoch e
    example(p) = walk(i),                 walk(x) = g(x) if g(x) < N, else walk(g(x))
    g(L, R):   for r = 1, 3, 5:           L ^= F_r(R),  then  R ^= F_{r+1}(L)
    F_r(x) = top bits of mix(K + r gamma + x)
    K = mix(mix(seed + gamma) + gamma + e)

N examples. g, a Feistel network of six rounds, permutes the numbers of
max(8, ceil(log2 N)) bits; L is their upper half and has the odd bit. Walking on from
what is not below N keeps it a permutation of 0 .. N-1, for under 2 evaluations of g an
example where N > 128, and 256/N below. Domains of fewer bits would do with fewer, but
are visibly not uniform. mix and gamma are SplitMix64's: F_r(x) is the top of the r-th
output of the generator started at K + x.

All is a function of (seed, e, i): any step is as near as the next, and memory does not
grow with N. Blocks of positions are computed at once, and the last few are kept.

Other orders are built on this one: `by_length`, `weighted` and `growing`.

Sources: Luby and Rackoff 1988, How to construct pseudorandom permutations (Feistel
networks); Black and Rogaway 2002, Ciphers with arbitrary finite domains (cycle walking);
Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators (SplitMix64).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, Protocol, final, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.errors import OrderError

__all__ = ["MAX_EXAMPLES", "LastBatch", "Order", "OrderProtocol"]

LastBatch = Literal["keep", "carry", "drop"]
"""What becomes of an epoch's ragged end: a short batch, the head of the next epoch's, nothing."""

MAX_EXAMPLES: Final = 10**12

_Words = NDArray[np.uint64]

_BLOCK = 2**14  # positions computed at once: 128 KiB
_ROUNDS = 6
_MIN_BITS = 8
_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


@runtime_checkable
class OrderProtocol(Protocol):
    """What a training loop asks of an order: write your own for mixtures or curricula.

    Every method must be a pure function of its argument: resuming at a step asks for that step.
    An order whose batches run on into the next epoch, or hold an example twice, has a method
    `visits(step)` besides, as `Order` has. Runs compare orders by what they print.
    """

    @property
    def seed(self) -> int:
        """What the random numbers of the model and of augmentation come from, too."""

    def indices(self, step: int) -> torch.Tensor:
        """Indices of the examples of this step: int64 [B] on the CPU, B >= 1."""

    def num_steps(self, epochs: int) -> int:
        """Number of steps in this many epochs."""

    def epoch(self, step: int) -> int:
        """Epoch of the first example of this step, from 0."""

    def examples_before(self, step: int) -> int:
        """Number of examples used before this step."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A new permutation of the data each epoch, cut into batches.

    Args:
        num_examples: N, examples in the data set, 1 to 10^12.
        batch_size: B, examples of one step, over all ranks.
        seed: chooses the permutations, 0 to 2^64 - 1.
        last: an epoch's ragged end of N mod B examples is a short batch ("keep"), goes
            on into the next epoch ("carry"), or is left out that epoch ("drop").
        shuffle: False leaves the examples of each epoch in the order of the data.

    Raises:
        OrderError: an argument is out of range or not an integer, or B > N without "carry".
    """

    num_examples: int = field(kw_only=False)
    batch_size: int
    seed: int = 0
    last: LastBatch = "keep"
    shuffle: bool = True

    def __post_init__(self) -> None:
        _check_integers(self)
        _check_bounds(self.num_examples, self.seed)
        if self.last != "carry":
            _check_fits(self.batch_size, self.num_examples, "Use last='carry', or")
        _check_choices(self)

    def indices(self, step: int) -> torch.Tensor:
        """Indices of the examples of this step.

        Args:
            step: any step >= 0, in any order of calls.

        Returns:
            int64 [B] on the CPU, the caller's to change; [N mod B] for a short last batch.

        Raises:
            OrderError: step is negative or not an integer.
        """
        epoch, first, count = self._span(_integer("step", step, 0, "Steps count from 0."))
        return torch.from_numpy(_examples(self, epoch * self.num_examples + first, count))

    def num_steps(self, epochs: int) -> int:
        """Number of whole steps in this many epochs.

        keep: epochs ceil(N / B); drop: epochs floor(N / B); carry: floor(epochs N / B).

        Raises:
            OrderError: epochs is negative or not an integer.
        """
        epochs = _integer("epochs", epochs, 0, "Whole epochs only.")
        if self.last == "carry":
            return epochs * self.num_examples // self.batch_size
        return epochs * self._steps_per_epoch

    def epoch(self, step: int) -> int:
        """Epoch of the first example of this step, from 0."""
        return self._span(_integer("step", step, 0, "Steps count from 0."))[0]

    def examples_before(self, step: int) -> int:
        """Number of examples used before this step; what "drop" leaves out does not count."""
        step = _integer("step", step, 0, "Steps count from 0.")
        if self.last == "keep":
            epoch, first, _ = self._span(step)
            return epoch * self.num_examples + first
        return step * self.batch_size

    def visits(self, step: int) -> list[int]:
        """What tells the visits of one example apart, for each example of this step: its epoch."""
        epoch, first, count = self._span(_integer("step", step, 0, "Steps count from 0."))
        return [epoch + place // self.num_examples for place in range(first, first + count)]

    @property
    def _steps_per_epoch(self) -> int:
        whole, ragged = divmod(self.num_examples, self.batch_size)
        return whole + (self.last == "keep" and ragged > 0)

    def _span(self, step: int) -> tuple[int, int, int]:
        """Epoch and place there of the step's first example, and how many examples follow."""
        if self.last == "carry":
            return *divmod(step * self.batch_size, self.num_examples), self.batch_size
        epoch, place = divmod(step, self._steps_per_epoch)
        first = place * self.batch_size
        return epoch, first, min(self.batch_size, self.num_examples - first)


_INTEGERS = (
    (
        "num_examples",
        1,
        "Pass len(data). An empty data set has no order: look at path and filters.",
    ),
    ("batch_size", 1, "It counts the examples of one update, over all ranks. Divide it with //."),
    ("seed", 0, "Any integer from 0 to 2^64 - 1 chooses an order."),
    ("window", 1, "It counts the batches whose examples are sorted together."),
)


def _check_integers(order: object) -> None:
    """Those of the fields that the order has, made Python's own integers."""
    for name, least, hint in _INTEGERS:
        if hasattr(order, name):
            object.__setattr__(order, name, _integer(name, getattr(order, name), least, hint))


def _check_bounds(num_examples: int, seed: int) -> None:
    if num_examples > MAX_EXAMPLES:
        raise OrderError(
            f"num_examples is {num_examples}, expected at most 10^12: the permutation is "
            f"tested up to there. Count documents or windows of text, not tokens or bytes."
        )
    if seed >= 2**64:
        raise OrderError(
            f"seed is {seed}, expected less than 2^64: a key has 64 bits, so another seed "
            f"would give the same order. Pass {seed % 2**64}."
        )


def _check_fits(batch_size: int, num_examples: int, fix: str = "Use") -> None:
    if batch_size > num_examples:
        raise OrderError(
            f"batch_size is {batch_size}, expected at most num_examples, {num_examples}: an epoch "
            f"does not fill one batch. {fix} a batch of at most {num_examples}."
        )


def _check_choices(order: Order) -> None:
    if order.last not in get_args(LastBatch):
        raise OrderError(
            f"last is {order.last!r}, expected 'keep' (a short last batch), 'carry' (batches go "
            f"on into the next epoch) or 'drop' (the ragged end is left out)."
        )
    if not isinstance(order.shuffle, bool):
        raise OrderError(
            f"shuffle is {order.shuffle!r}, expected True (a new permutation each epoch) or "
            f"False (the order of the data). A seed goes into seed=."
        )


def _integer(name: str, value: object, least: int, hint: str) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise OrderError(
            f"{name} is {value!r} of type {type(value).__name__}, expected an integer. {hint}"
        )
    if value < least:
        raise OrderError(f"{name} is {value}, expected at least {least}. {hint}")
    return int(value)


def _examples(order: Order, position: int, count: int) -> NDArray[np.int64]:
    """example(p) for so many positions p from this one, whatever the batches: [count]."""
    parts = []
    while count:
        number, offset = divmod(position, _BLOCK)
        block = _block(order.num_examples, order.seed, order.shuffle, number)
        part = block[offset : offset + count]
        parts.append(part)
        position += len(part)
        count -= len(part)
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)  # blocks are shared


@lru_cache(maxsize=4)
def _block(num_examples: int, seed: int, shuffle: bool, number: int) -> NDArray[np.int64]:
    """example(p) for the positions p of block `number`: [_BLOCK]."""
    epoch, first = divmod(number * _BLOCK, num_examples)
    place = np.arange(first, first + _BLOCK, dtype=np.uint64)
    epochs_on = place // num_examples
    place -= epochs_on * np.uint64(num_examples)
    if shuffle:
        epochs_on += np.uint64(epoch % 2**64)
        place = _permute(place, _keys(np.array([seed], np.uint64), epochs_on), num_examples)
    return place.view(np.int64)


def _permute(place: _Words, key: _Words, num_examples: int) -> _Words:
    """walk(place) under each element's key: both [n]."""
    bits = max(_MIN_BITS, (num_examples - 1).bit_length())
    value = _feistel(place, key, bits)
    outside = np.flatnonzero(value >= num_examples)
    while outside.size:
        value[outside] = _feistel(value[outside], key[outside], bits)
        outside = outside[value[outside] >= num_examples]
    return value


def _feistel(value: _Words, key: _Words, bits: int) -> _Words:
    """g(value), a permutation of 0 .. 2^bits - 1 for each key."""
    high, low = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    left = value >> low
    right = value ^ (left << low)
    key = key.copy()
    for _ in range(_ROUNDS // 2):
        key += _GAMMA
        left ^= _mix(key + right) >> (np.uint64(64) - high)
        key += _GAMMA
        right ^= _mix(key + left) >> (np.uint64(64) - low)
    return (left << low) | right


def _keys(seed: _Words, epoch: _Words) -> _Words:
    """K(seed, epoch), elementwise."""
    return _mix(_mix(seed + _GAMMA) + _GAMMA + epoch)


def _words(key: _Words, first: int, count: int) -> _Words:
    """mix(key + p gamma) for so many p from first + 1: outputs of SplitMix64 begun at the key."""
    number = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(first % 2**64)
    return _mix(key + _GAMMA * number)


def _mix(z: _Words) -> _Words:
    """SplitMix64's finaliser, in place: multiplication modulo 2^64."""
    z ^= z >> 30
    z *= 0xBF58476D1CE4E5B9
    z ^= z >> 27
    z *= 0x94D049BB133111EB
    z ^= z >> 31
    return z
