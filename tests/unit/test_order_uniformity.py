"""Compare the order with a true shuffle, statistic by statistic.

Statistics are p-values of what a uniform permutation would give, each at fixed seeds.
30 of them must exceed `DOUBT` = 1e-5: with other seeds a true shuffle would fail one of
them with probability 3e-4. Every flawed shuffle must fall below it.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from anybatch.order import Order, permutation
from permutation_by_hand import halves

Sampler = Callable[[int, int], np.ndarray]  # (n, count) -> count permutations of n: [count, n]

DOUBT = 1e-5


# ---------------------------------------------------------------- the subjects


def over_epochs(n: int, count: int) -> np.ndarray:
    stream = Order(n, batch_size=n * count, seed=11, last="carry").indices(0)
    return stream.numpy().reshape(count, n)


def over_seeds(n: int, count: int) -> np.ndarray:
    """Epoch 0 under seeds 0, 1, 2, ..., all at once; the first ones as Order gives them."""
    keys = permutation.derive_keys(np.arange(count, dtype=np.uint64), np.zeros(1, np.uint64))
    places = np.tile(np.arange(n, dtype=np.uint64), count)
    rows = permutation.permute(places, np.repeat(keys, n), n).astype(int).reshape(count, n)
    for seed in range(3):
        assert rows[seed].tolist() == Order(n, batch_size=n, seed=seed).indices(0).tolist()
    return rows


def true_shuffle(n: int, count: int) -> np.ndarray:
    return np.random.default_rng(5).permuted(np.tile(np.arange(n), (count, 1)), axis=1)


def rotation(n: int, count: int) -> np.ndarray:
    return (np.arange(n) + np.random.default_rng(6).integers(n, size=(count, 1))) % n


def affine(n: int, count: int) -> np.ndarray:
    """i -> (a i + b) mod n, a linear congruential permutation."""
    rng = np.random.default_rng(7)
    units = [a for a in range(1, n) if math.gcd(a, n) == 1]
    return (
        rng.choice(units, size=(count, 1)) * np.arange(n) + rng.integers(n, size=(count, 1))
    ) % n


def one_round(n: int, count: int) -> np.ndarray:
    """One round of a Feistel network with a truly random round function, and cycle walking."""
    high, low = halves(n)
    x = np.arange(2 ** (high + low))
    random = np.random.default_rng(8).integers(2**high, size=(count, 2**low))
    left, right = (x >> low) ^ random[:, x % 2**low], x % 2**low
    table = right << high | left
    rows = table[:, :n]
    while (rows >= n).any():
        rows = np.where(rows < n, rows, np.take_along_axis(table, rows, axis=1))
    return rows


def one_for_all_epochs(n: int, count: int) -> np.ndarray:
    return np.tile(true_shuffle(n, 1), (count, 1))


def turn_each_epoch(n: int, count: int) -> np.ndarray:
    return (one_for_all_epochs(n, count) + np.arange(count)[:, None]) % n


# ---------------------------------------------------------------- the statistics


def chi_square_p(statistic: float, degrees: float) -> float:
    """Two-sided: counts that are too even are no more random than uneven ones."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    above, below = torch.special.gammaincc(*half), torch.special.gammainc(*half)
    return 2 * min(above.item(), below.item())


def goodness_p(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return chi_square_p(float(((counts - expected) ** 2 / expected).sum()), counts.size - 1)


def position_against_value(rows: np.ndarray) -> float:
    """Each value in each place equally often; margins are fixed, hence (n-1)^2 degrees."""
    count, n = rows.shape
    table = np.bincount((np.arange(n) * n + rows).ravel(), minlength=n * n)
    statistic = ((table - count / n) ** 2 / (count / n)).sum() * (n - 1) / n
    return chi_square_p(statistic, (n - 1) ** 2)


def first_pair(rows: np.ndarray) -> float:
    """Test the first two values: n (n-1) ordered pairs, equally likely."""
    n = rows.shape[1]
    pairs = np.bincount(rows[:, 0] * n + rows[:, 1], minlength=n * n).reshape(n, n)
    return goodness_p(pairs[~np.eye(n, dtype=bool)], len(rows) / (n * (n - 1)))


def all_orders(rows: np.ndarray) -> float:
    """Each of the n! permutations equally often, told apart by their Lehmer code."""
    n = rows.shape[1]
    code = np.zeros(len(rows), int)
    for i in range(n):
        code = code * (n - i) + (rows[:, i + 1 :] < rows[:, i : i + 1]).sum(axis=1)
    counts = np.bincount(code, minlength=math.factorial(n))
    return goodness_p(counts, len(rows) / math.factorial(n))


def from_epoch_to_epoch(rows: np.ndarray) -> float:
    """All orders, of the permutation that leads from each even row to the next."""
    return all_orders(np.take_along_axis(np.argsort(rows[::2], axis=1), rows[1::2], axis=1))


def serial_correlation(rows: np.ndarray) -> float:
    """Circular lag-1 product; mean and variance under permutation: Wald and Wolfowitz 1943."""
    count, n = rows.shape
    x = rows - (n - 1) / 2
    s2, s4 = (x[0] ** 2).sum(), (x[0] ** 4).sum()  # odd sums vanish
    mean = -s2 / (n - 1)
    variance = (s2**2 - s4) / (n - 1) + (s2**2 - 2 * s4) / ((n - 1) * (n - 2)) - mean**2
    total = (x * np.roll(x, 1, axis=1)).sum()
    return math.erfc(abs(total - count * mean) / math.sqrt(2 * count * variance))


def coarse_table(rows: np.ndarray, bins: int = 16) -> float:
    """Place against value, each in 16 bins, in every single row; margins are fixed."""
    count, n = rows.shape
    place = np.arange(n) * bins // n
    margin = np.bincount(place)
    expected = np.outer(margin, margin) / n
    statistic = 0.0
    for row in rows:
        table = np.bincount(place * bins + place[row], minlength=bins**2).reshape(bins, bins)
        statistic += ((table - expected) ** 2 / expected).sum() * (n - 1) / n
    return chi_square_p(statistic, count * (bins - 1) ** 2)


def first_batch_balance(rows: np.ndarray, classes: int = 10, batch: int = 50) -> float:
    """Examples of class 0 in the first batch of class-sorted data: hypergeometric."""
    count, n = rows.shape
    members = n // classes
    visited = np.clip((rows[:, :batch] < members).sum(axis=1), 1, 10)  # 10 bins, ends pooled
    chance = np.zeros(10)
    for k in range(batch + 1):
        ways = math.comb(members, k) * math.comb(n - members, batch - k)
        chance[min(max(k, 1), 10) - 1] += ways / math.comb(n, batch)
    return goodness_p(np.bincount(visited, minlength=11)[1:], count * chance)


STATISTICS: dict[str, tuple[Callable[[np.ndarray], float], int, int]] = {  # statistic, n, rows
    "value in place, 16": (position_against_value, 16, 20_000),
    "value in place, 100": (position_against_value, 100, 10_000),
    "first pair": (first_pair, 16, 20_000),
    "all orders": (all_orders, 5, 60_000),
    "epoch to epoch": (from_epoch_to_epoch, 5, 60_000),
    "serial, 1000": (serial_correlation, 1000, 500),
    "serial, 60000": (serial_correlation, 60_000, 4),
    "coarse table, 1797": (coarse_table, 1797, 100),
    "coarse table, 60000": (coarse_table, 60_000, 4),
    "first batch": (first_batch_balance, 1000, 1000),
}


def p_value(sampler: Sampler, name: str) -> float:
    statistic, n, count = STATISTICS[name]
    return statistic(sampler(n, count))


@pytest.mark.fast(7)
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("sampler", [over_epochs, over_seeds, true_shuffle])
def test_the_order_cannot_be_told_from_a_true_shuffle(sampler, name):
    assert p_value(sampler, name) > DOUBT


@pytest.mark.fast(1)
@pytest.mark.parametrize(
    ("sampler", "names"),
    [
        (rotation, ["first pair", "all orders", "serial, 1000", "coarse table, 1797"]),
        (rotation, ["serial, 60000", "coarse table, 60000", "first batch"]),
        (affine, ["first pair", "all orders", "coarse table, 1797", "first batch"]),
        (one_round, ["value in place, 100", "first pair", "all orders", "epoch to epoch"]),
        (one_round, ["serial, 1000", "serial, 60000", "coarse table, 1797", "first batch"]),
        (one_for_all_epochs, ["value in place, 16", "value in place, 100", "epoch to epoch"]),
        (turn_each_epoch, ["epoch to epoch"]),
    ],
)
def test_the_statistics_catch_flawed_shuffles(sampler, names):
    for name in names:
        assert p_value(sampler, name) < DOUBT, name


@pytest.fixture
def no_blocks_kept() -> Iterator[None]:
    permutation._get_block.cache_clear()
    yield
    permutation._get_block.cache_clear()


@pytest.mark.usefixtures("no_blocks_kept")
def test_the_statistics_catch_too_few_rounds_and_too_small_a_domain(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(permutation, "_ROUNDS", 2)
        assert p_value(over_epochs, "first pair") < DOUBT
        assert p_value(over_seeds, "all orders") < DOUBT
    permutation._get_block.cache_clear()
    monkeypatch.setattr(permutation, "_MIN_BITS", 4)
    assert all_orders(over_epochs(5, 400_000)) < DOUBT
