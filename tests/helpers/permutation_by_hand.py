"""Oracle of the shuffle of `Order`: one position at a time, in Python integers, both ways.

The equations are those of `anybatch.order`; nothing of it is imported. `example_at` goes from a
position of the stream to an example, `place_of` from an example back to its place in the epoch.
"""

import math

GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def key_of(seed: int, epoch: int) -> int:
    return mix(mix(seed + GAMMA & MASK) + GAMMA + epoch & MASK)


def halves(num_examples: int) -> tuple[int, int]:
    bits = max(8, math.ceil(math.log2(num_examples)))
    return bits - bits // 2, bits // 2


def example_at(position: int, num_examples: int, seed: int) -> int:
    high, low = halves(num_examples)
    epoch, x = divmod(position, num_examples)
    key = key_of(seed, epoch)
    while True:
        left, right = divmod(x, 2**low)
        for r in (1, 3, 5):
            left ^= mix(key + r * GAMMA + right & MASK) >> 64 - high
            right ^= mix(key + (r + 1) * GAMMA + left & MASK) >> 64 - low
        x = left * 2**low + right
        if x < num_examples:
            return x


def place_of(example: int, num_examples: int, key: int) -> int:
    """Invert the permutation: rounds in reverse, walking back."""
    high, low = halves(num_examples)
    x = example
    while True:
        left, right = divmod(x, 2**low)
        for r in (5, 3, 1):
            right ^= mix(key + (r + 1) * GAMMA + left & MASK) >> 64 - low
            left ^= mix(key + r * GAMMA + right & MASK) >> 64 - high
        x = left * 2**low + right
        if x < num_examples:
            return x
