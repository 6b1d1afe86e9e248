"""Seeds are pinned: another seed would change every augmentation, dropout and resume in silence.

Oracle: BLAKE2b of the numbers in the order seed, epoch (or step), id (or grain), by `hashlib`.
"""

import hashlib

import numpy as np
import pytest
import torch

import anybatch as ab
from anybatch.randomness import hash_integers


def hash_text(text: str) -> int:
    """Return the first 63 bits of the BLAKE2b hash of a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") // 2


@pytest.mark.parametrize(
    ("numbers", "seed"),
    [
        ((0, 1, 42), 325258945701633902),
        ((42, 1, 0), 592904434936336940),
        ((1, 0, 42), 7690677398434895263),
        ((7, 3, 2**40), 8033451784362213761),
        ((-1, 0, 0), 7366362740291742494),
    ],
)
def test_seeds_are_hashes_of_the_numbers_in_their_order(numbers, seed):
    expected = hash_text(",".join(map(str, numbers)))
    assert hash_integers(*numbers) == expected == seed
    assert ab.Key(*numbers[:2]).grain(numbers[2]) == expected
    key = ab.ExampleKey(*numbers)
    assert key.generator().initial_seed() == expected
    assert key.numpy().integers(2**60) == np.random.default_rng(expected).integers(2**60)


def test_each_number_of_a_key_has_its_place():  # the control: exchanged numbers are other seeds
    keys = [ab.ExampleKey(*numbers) for numbers in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (3, 2, 1))]
    assert len({key.generator().initial_seed() for key in keys}) == 4


def test_what_a_key_draws_is_the_same_for_ever():
    draws = torch.rand(3, generator=ab.ExampleKey(seed=0, epoch=1, id=42).generator())
    assert draws.tolist() == pytest.approx(
        [0.9677475, 0.5214415, 0.0584841], abs=1e-6
    )  # float32 in [0, 1)
