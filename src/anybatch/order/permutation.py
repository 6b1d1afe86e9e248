"""Keyed random permutations of any size, of which any part is computed alone.

Positions p = 0, 1, 2, ... run on through all epochs. Each epoch e is a permutation of its own:

    p = e N + i,   0 <= i < N             position i of epoch e
    example(p) = walk(i),                 walk(x) = g(x) if g(x) < N, else walk(g(x))
    g(L, R):   for r = 1, 3, 5:           L ^= F_r(R),  then  R ^= F_{r+1}(L)
    F_r(x) = top bits of mix(K + r gamma + x)
    K = mix(mix(seed + gamma) + gamma + e)

N is the number of examples. g, a Feistel network of six rounds, permutes the numbers of
max(8, ceil(log2 N)) bits; L is their upper half and has the odd bit. A result of N or more is
permuted again ("cycle walking"), which keeps the whole a permutation of 0 .. N-1. It takes under 2
evaluations of g an example if N > 128, and 256/N otherwise. Fewer bits would take fewer, but the
permutations of small N would visibly not be uniform. mix and gamma are SplitMix64's: F_r(x) is the
top of the r-th output of the generator started at K + x.

All is a function of (seed, e, i): memory does not grow with N, and any step takes the same time.
Blocks of positions are computed at once, and the last few are cached.

Sources: Luby and Rackoff 1988, How to construct pseudorandom permutations (Feistel networks);
Black and Rogaway 2002, Ciphers with arbitrary finite domains (cycle walking); Steele, Lea and
Flood 2014, Fast splittable pseudorandom number generators (SplitMix64).
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "derive_keys", "get_examples", "mix", "permute", "random_words"]

Words = NDArray[np.uint64]

_BLOCK = 2**14  # positions computed at once: 128 KiB
_ROUNDS = 6
_MIN_BITS = 8
_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def get_examples(
    num_examples: int, seed: int, position: int, count: int, *, shuffle: bool = True
) -> NDArray[np.int64]:
    """Return example(p) for `count` positions p from this one: [count]."""
    pieces = []
    while count:
        number, offset = divmod(position, _BLOCK)
        piece = _get_block(num_examples, seed, shuffle, number)[offset : offset + count]
        pieces.append(piece)
        position += len(piece)
        count -= len(piece)
    return pieces[0].copy() if len(pieces) == 1 else np.concatenate(pieces)  # blocks are shared


@lru_cache(maxsize=4)
def _get_block(num_examples: int, seed: int, shuffle: bool, number: int) -> NDArray[np.int64]:
    """Compute example(p) for the positions p of a block: [_BLOCK]."""
    epoch, first = divmod(number * _BLOCK, num_examples)
    place = np.arange(first, first + _BLOCK, dtype=np.uint64)
    epochs = place // num_examples  # after the block's first
    place -= epochs * np.uint64(num_examples)
    if shuffle:
        epochs += np.uint64(epoch % 2**64)
        place = permute(place, derive_keys(np.array([seed], np.uint64), epochs), num_examples)
    return place.view(np.int64)


def permute(place: Words, key: Words, num_examples: int) -> Words:
    """Compute walk(place) under each element's key: both [n]."""
    bits = max(_MIN_BITS, (num_examples - 1).bit_length())
    value = _feistel(place, key, bits)
    outside = np.flatnonzero(value >= num_examples)
    while outside.size:
        value[outside] = _feistel(value[outside], key[outside], bits)
        outside = outside[value[outside] >= num_examples]
    return value


def _feistel(value: Words, key: Words, bits: int) -> Words:
    """Compute g(value), a permutation of 0 .. 2^bits - 1 for each key."""
    high, low = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    left = value >> low
    right = value ^ (left << low)
    key = key.copy()
    for _ in range(_ROUNDS // 2):
        key += _GAMMA
        left ^= mix(key + right) >> (np.uint64(64) - high)
        key += _GAMMA
        right ^= mix(key + left) >> (np.uint64(64) - low)
    return (left << low) | right


def derive_keys(seed: Words, epoch: Words) -> Words:
    """Compute K(seed, epoch), elementwise."""
    return mix(mix(seed + _GAMMA) + _GAMMA + epoch)


def random_words(key: Words, first: int, count: int) -> Words:
    """Compute mix(key + p gamma) for `count` numbers p from first + 1: outputs of SplitMix64."""
    number = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(first % 2**64)
    return mix(key + _GAMMA * number)


def mix(z: Words) -> Words:
    """Apply SplitMix64's finaliser, in place: multiplication modulo 2^64."""
    z ^= z >> 30
    z *= 0xBF58476D1CE4E5B9
    z ^= z >> 27
    z *= 0x94D049BB133111EB
    z ^= z >> 31
    return z
