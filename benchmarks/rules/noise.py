"""Noise scale of the network, measured three ways and along one run.

    B_simple = tr(S) / |G|^2

- *Ledger*: 40 observed batches of 512, added up, with the library's interval.
- *Two batches*: 40 other batches, each in 16 parts of 32. |G|^2 and tr(S) follow from the squared
  norms at both sizes (McCandlish et al. 2018, appendix A.1). Numerators and denominators are
  averaged separately, with Fieller's interval over the 40.
- *Brute force*: the gradients of all 60,000 examples.

On digits: batches of 32, parts of 2, all 1,438 examples.

The examples are themselves a sample. So brute force, like the other two, takes
|g|^2 - tr(S) / 60,000 for |G|^2, where g is the gradient over all of them.
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
    build_network,
    build_reference,
    load_examples,
    read_schedule,
    round_figures,
    run_sgd,
    run_updates,
)
from rules.data import by_data
from rules.rates import reference_rate
from rules.steps import mean_steps
from rules.tuning import SIZES, best_rate

__all__ = ["POINTS", "fieller_interval", "list_jobs", "run_job"]

POINTS = (0, 1, 5)  # epochs
NUM_BATCHES = 40
SMALL, LARGE = by_data({"fashion_mnist": (32, 512), "digits": (2, 32)})  # 40 are disjoint
T_95 = 2.0227  # Student's t, 39 degrees of freedom, 97.5 %
LARGEST, ALONG = SIZES[-1], 12  # points along a run of this batch size


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List three points of the reference, and a training to the target at the largest batch."""
    lr, largest = reference_rate(raw, "sgd"), best_rate(raw, LARGEST)
    end = round(mean_steps(raw, LARGEST))
    three = [{"what": "three ways", "lr": lr, "end": None, "seed": seed} for seed in SEEDS]
    return three + [{"what": "along", "lr": largest, "end": end, "seed": seed} for seed in SEEDS]


def run_job(what: str, lr: float, end: int | None, seed: int) -> dict[str, Any]:
    """Measure at the points of one training."""
    if end is None:
        return {"points": [measure_three_ways(model, seed) for model in _train_to_points(lr, seed)]}
    estimates = []
    for model in _train_along(lr, end, seed):
        estimate = estimate_by_ledger(model, seed)
        estimates.append(
            [round_figures(estimate.variance), round_figures(estimate.gradient_square)]
        )
    return {"points": estimates}


def measure_three_ways(model: nn.Module, seed: int) -> dict[str, Any]:
    """Measure value and interval in each way."""
    scale = estimate_by_ledger(model, seed).scale()
    return {
        "ledger": [_finite(value) for value in (scale.value, scale.low, scale.high)],
        "two batches": [_finite(value) for value in estimate_by_norms(model, seed)],
        "brute force": _finite(estimate_by_brute_force(model)),
    }


def estimate_by_ledger(model: nn.Module, seed: int) -> NoiseEstimate:
    """Add up the ledger's estimates over the batches of an order."""
    estimates = []
    for batch in _iterate_batches(seed):
        observe = ab.Observe(norms=True, alignment=True)
        rows = ab.batch_gradient(model, OBJECTIVE, batch, observe=observe).ledger
        assert rows is not None
        assert rows.norms is not None
        squares = rows.norms.double().square()
        estimates.append(noise_estimate(squares, rows.alignment, None, _square_gradient(model)))
    total = estimates[0]
    for estimate in estimates[1:]:
        total = total + estimate
    return total


def estimate_by_norms(model: nn.Module, seed: int) -> tuple[float, float, float]:
    """Return value and 95 % interval from the norms at two sizes."""
    signal, noise = [], []
    for batch in _iterate_batches(seed + len(SEEDS)):
        parts = zip(*(column.split(SMALL) for column in batch), strict=True)
        small = mean(_square_batch_gradient(model, part) for part in parts)
        large = _square_batch_gradient(model, batch)
        signal.append((LARGE * large - SMALL * small) / (LARGE - SMALL))
        noise.append((small - large) / (1 / SMALL - 1 / LARGE))
    return mean(noise) / mean(signal), *fieller_interval(noise, signal, T_95)


def fieller_interval(above: list[float], below: list[float], t: float) -> tuple[float, float]:
    """Return the interval of the ratio mean(above) / mean(below), from 0 on.

    It contains each r for which the mean of `above - r below` is within t standard errors of 0.

    Source: Fieller 1954.
    """
    pairs = torch.tensor([above, below], dtype=torch.float64)
    (var_a, cov), (_, var_b) = (t * t * pairs.cov() / len(above)).tolist()
    a, b = pairs.mean(1).tolist()
    square, middle, rest = b * b - var_b, a * b - cov, a * a - var_a
    root = math.sqrt(max(middle**2 - square * rest, 0.0))
    if square <= 0:  # the denominator may be 0: there is no upper end
        return (rest / (middle + root) if rest > 0 else 0.0), math.inf
    return (middle - root) / square, (middle + root) / square


def estimate_by_brute_force(model: nn.Module) -> float:
    """Return the noise scale from every example's gradient."""
    whole = ab.batch_gradient(
        model,
        OBJECTIVE,
        load_examples("train"),
        layout=ab.Layout(micro_batch=1000),
        observe=ab.Observe(norms=True),
    )
    assert whole.ledger is not None
    assert whole.ledger.norms is not None
    second, square = float(whole.ledger.norms.double().square().mean()), _square_gradient(model)
    variance = (second - square) * FULL / (FULL - 1)
    return variance / (square - variance / FULL)


def _iterate_batches(seed: int) -> Iterator[Any]:
    """Yield disjoint batches of the training set."""
    order = ab.Order(FULL, batch_size=LARGE, seed=seed)
    for step in range(NUM_BATCHES):
        ids = order.indices(step)
        yield tuple(column.index_select(0, ids) for column in load_examples("train"))


def _square_batch_gradient(model: nn.Module, batch: Any) -> float:
    ab.batch_gradient(model, OBJECTIVE, batch)
    return _square_gradient(model)


def _square_gradient(model: nn.Module) -> float:
    """Return |g|^2 of the gradient in `.grad`."""
    return sum(
        float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None
    )


def _train_to_points(lr: float, seed: int) -> Iterator[nn.Module]:
    """Train the reference and yield the model at each of `POINTS`."""
    recipe = build_reference("sgd", lr)
    yield build_network(seed)
    for model, step in run_updates(recipe, seed, read_schedule(recipe)):
        if step.ends_epoch and step.epoch + 1 in POINTS:
            yield model
        if step.ends_epoch and step.epoch + 1 == POINTS[-1]:
            return


def _train_along(lr: float, end: int, seed: int) -> Iterator[nn.Module]:
    """Train and yield the model in the middle of each of `ALONG` equal stretches up to `end`."""
    wanted = [round(end * (2 * point + 1) / (2 * ALONG)) for point in range(ALONG)]
    model = build_network(seed)
    if 0 in wanted:
        yield model
    for step in run_sgd(model, LARGEST, lr, seed, end * LARGEST // FULL + 1):
        if step.step + 1 in wanted:
            yield model
        if step.step + 1 == wanted[-1]:
            return


def _finite(value: float) -> float | None:
    """Return a number for a raw file; None where it is not finite."""
    return round_figures(value) if math.isfinite(value) else None
