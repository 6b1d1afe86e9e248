"""The noise scale of the network three ways, and along the run that the curve of steps predicts.

    B_simple = tr(S) / |G|^2

*Ledger*: 40 batches of 512, each observed, summed up, with the library's interval. *Two batches*:
40 others, each of 16 parts of 32: |G|^2 and tr(S) from the squared norms at both sizes (McCandlish
et al. 2018, appendix A.1), numerators and denominators averaged apart, with Fieller's interval over
the 40. *Brute force*: the gradients of all 60,000 examples. Of digits: batches of 32, parts of 2,
all 1,438.

The examples are a sample too: like the other two, brute force takes |g|^2 - tr(S) / 60,000 for
|G|^2, g being the gradient over all of them.
"""

import math
from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

import torch
from torch import nn

import anybatch as ab
from anybatch.ledger.noise import NoiseEstimate, noise_estimate
from rules.common import (
    FULL,
    OBJECTIVE,
    SEEDS,
    examples,
    network,
    plain_sgd,
    reference,
    rounded,
    updates,
    warmed_up,
)
from rules.data import by_data
from rules.rates import tuned
from rules.steps import steps_at
from rules.tuning import SIZES, tuned_rate

__all__ = ["POINTS", "fieller", "jobs", "run"]

POINTS = (0, 1, 5)  # epochs
NUM_BATCHES = 40
SMALL, LARGE = by_data({"fashion_mnist": (32, 512), "digits": (2, 32)})  # 40 are disjoint
T_95 = 2.0227  # Student's t, 39 degrees of freedom, 97.5 %
LARGEST, ALONG = SIZES[-1], 12  # points along a run of this batch size


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Three points of the reference, and a run to the target at the largest batch of the curve."""
    lr, largest = tuned(raw, "sgd"), tuned_rate(raw, LARGEST)
    end = round(steps_at(raw, LARGEST))
    three = [{"what": "three ways", "lr": lr, "end": None, "seed": seed} for seed in SEEDS]
    return three + [{"what": "along", "lr": largest, "end": end, "seed": seed} for seed in SEEDS]


def run(what: str, lr: float, end: int | None, seed: int) -> dict[str, Any]:
    """Measure at the points of one run."""
    if end is None:
        return {"points": [three_ways(model, seed) for model in _at_epochs(lr, seed)]}
    found = []
    for model in _along(lr, end, seed):
        estimate = ledger(model, seed)
        found.append([rounded(estimate.variance), rounded(estimate.gradient_square)])
    return {"points": found}


def three_ways(model: nn.Module, seed: int) -> dict[str, Any]:
    """Value and interval of each."""
    scale = ledger(model, seed).scale()
    return {
        "ledger": [_number(value) for value in (scale.value, scale.low, scale.high)],
        "two batches": [_number(value) for value in two_batches(model, seed)],
        "brute force": _number(brute_force(model)),
    }


def ledger(model: nn.Module, seed: int) -> NoiseEstimate:
    """What the batches of an order tell together."""
    found = []
    for batch in _batches(seed):
        observe = ab.Observe(norms=True, alignment=True)
        seen = ab.batch_gradient(model, OBJECTIVE, batch, observe=observe).ledger
        assert seen is not None
        assert seen.norms is not None
        squares = seen.norms.double().square()
        found.append(noise_estimate(squares, seen.alignment, None, _square(model)))
    total = found[0]
    for estimate in found[1:]:
        total = total + estimate
    return total


def two_batches(model: nn.Module, seed: int) -> tuple[float, float, float]:
    """Value and 95 % interval from the norms at two sizes."""
    signal, noise = [], []
    for batch in _batches(seed + len(SEEDS)):
        parts = zip(*(column.split(SMALL) for column in batch), strict=True)
        small = mean(_square_of(model, part) for part in parts)
        large = _square_of(model, batch)
        signal.append((LARGE * large - SMALL * small) / (LARGE - SMALL))
        noise.append((small - large) / (1 / SMALL - 1 / LARGE))
    return mean(noise) / mean(signal), *fieller(noise, signal, T_95)


def fieller(above: list[float], below: list[float], t: float) -> tuple[float, float]:
    """All ratios r >= 0 for which the mean of `above - r below` is within t standard errors of 0.

    Source: Fieller 1954.
    """
    pairs = torch.tensor([above, below], dtype=torch.float64)
    (var_a, cov), (_, var_b) = (t * t * pairs.cov() / len(above)).tolist()
    a, b = pairs.mean(1).tolist()
    square, middle, rest = b * b - var_b, a * b - cov, a * a - var_a
    root = math.sqrt(max(middle**2 - square * rest, 0.0))
    if square <= 0:  # the denominator is not told from 0: all from the root that is positive on
        return (rest / (middle + root) if rest > 0 else 0.0), math.inf
    return (middle - root) / square, (middle + root) / square


def brute_force(model: nn.Module) -> float:
    """From every example's gradient."""
    whole = ab.batch_gradient(
        model,
        OBJECTIVE,
        examples("train"),
        layout=ab.Layout(micro_batch=1000),
        observe=ab.Observe(norms=True),
    )
    assert whole.ledger is not None
    assert whole.ledger.norms is not None
    second, square = float(whole.ledger.norms.double().square().mean()), _square(model)
    variance = (second - square) * FULL / (FULL - 1)
    return variance / (square - variance / FULL)


def _batches(seed: int) -> Iterator[Any]:
    """Disjoint batches of the training set."""
    order = ab.Order(FULL, batch_size=LARGE, seed=seed)
    for step in range(NUM_BATCHES):
        ids = order.indices(step)
        yield tuple(column.index_select(0, ids) for column in examples("train"))


def _square_of(model: nn.Module, batch: Any) -> float:
    ab.batch_gradient(model, OBJECTIVE, batch)
    return _square(model)


def _square(model: nn.Module) -> float:
    """|g|^2 of what is in `.grad`."""
    return sum(
        float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None
    )


def _at_epochs(lr: float, seed: int) -> Iterator[nn.Module]:
    """The model of the reference at each of the points."""
    recipe = reference("sgd", lr)
    yield network(seed)
    for model, step in updates(recipe, seed, warmed_up(recipe)):
        if step.ends_epoch and step.epoch + 1 in POINTS:
            yield model
        if step.ends_epoch and step.epoch + 1 == POINTS[-1]:
            return


def _along(lr: float, end: int, seed: int) -> Iterator[nn.Module]:
    """The model in the middle of each of ALONG equal runs of updates up to `end`."""
    wanted = [round(end * (2 * point + 1) / (2 * ALONG)) for point in range(ALONG)]
    model = network(seed)
    if 0 in wanted:
        yield model
    for step in plain_sgd(model, LARGEST, lr, seed, end * LARGEST // FULL + 1):
        if step.step + 1 in wanted:
            yield model
        if step.step + 1 == wanted[-1]:
            return


def _number(value: float) -> float | None:
    """For a raw file; None where there is no number."""
    return rounded(value) if math.isfinite(value) else None
