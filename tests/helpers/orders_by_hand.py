"""Oracles of the other orders: one example at a time, in Python integers and fractions.

The equations are those of `anybatch.order.by_length`, `.weighted` and `.growing`; nothing of these
is imported. Each returns the batches of so many epochs, as lists of examples.
"""

from fractions import Fraction

from permutation_by_hand import GAMMA, MASK, example_at, key_of, mix


def word(key, number):
    """Output `number`, from 1, of SplitMix64 begun at the key."""
    return mix(key + number * GAMMA & MASK)


def by_length(lengths, batch_size, seed, last, window, epochs):
    batches = []
    for epoch in range(epochs):
        n = len(lengths)
        left = [example_at(epoch * n + place, n, seed) for place in range(n)]
        number = 0
        while len(left) >= batch_size:
            size = min(window, len(left) // batch_size) * batch_size
            examples, left = sorted(left[:size], key=lambda i: lengths[i]), left[size:]
            cut = [examples[k : k + batch_size] for k in range(0, size, batch_size)]
            key = key_of(key_of(seed, epoch), number)
            visits = sorted(range(len(cut)), key=lambda b, key=key: word(key, b + 1))
            batches += [cut[b] for b in visits]
            number += 1
        if left and last == "keep":
            batches.append(left)
    return batches


def weighted(weights, batch_size, seed, epochs):
    exact = [Fraction(weight) for weight in weights]
    draws = []
    for position in range(epochs * len(weights) // batch_size * batch_size):
        mark = Fraction(word(key_of(seed, 0), position + 1) >> 11, 2**53) * sum(exact)
        example, total = 0, exact[0]
        while total <= mark:
            example += 1
            total += exact[example]
        draws.append(example)
    return [draws[k : k + batch_size] for k in range(0, len(draws), batch_size)]


def growing(num_examples, sizes, seed, epochs):
    batches, used = [], 0
    while True:
        size = [size for begin, size in sizes if begin <= used][-1]
        if used + size > epochs * num_examples:
            return batches
        batches.append([example_at(p, num_examples, seed) for p in range(used, used + size)])
        used += size
