"""Every layout gives the gradient of the unsplit batch.

Oracle: `cases.oracle`, plain autograd of R and Omega written out below, on the whole batch.
Tolerance: promise 1 of the design, 1e-12 in float64 and 1e-5 in float32, as the norm of the
difference over the norm: sums in another order differ by some units of rounding a term.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    PROBLEMS,
    SEED,
    STEP,
    Problem,
    Told,
    distance,
    flat_gradient,
    grain_edges,
    oracle,
)
from torch import Tensor, nn

import anybatch as ab

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
KEY = ab.Key(seed=SEED, step=STEP)


def taking_part(told: Told) -> tuple[Tensor, Tensor]:
    """v and n of the examples with n_i > 0."""
    counts = torch.ones_like(told.values) if told.counts is None else told.counts
    return told.values[counts > 0], counts[counts > 0]


def mean(told):
    v, n = taking_part(told)
    return v.sum() / n.sum()


def maximum(told):
    v, n = taking_part(told)
    return (v / n).amax()  # torch shares the derivative of amax equally over ties


def top_fraction(told, q=0.3):
    v, n = taking_part(told)
    k, largest = max(q * len(v), 1.0), (v / n).sort(descending=True).values
    whole = int(k + 1e-9)
    rest = (k - whole) * largest[whole] if k - whole > 1e-9 else 0
    return (largest[:whole].sum() + rest) / k


def tilted(told, t=0.7):
    v, n = taking_part(told)
    return (t * v / n).exp().mean().log() / t


def group_dro(told, eta=0.5):
    v, n = taking_part(told)
    counts = torch.ones(len(told.values)) if told.counts is None else told.counts
    groups, num_groups = told.groups[counts > 0], int(told.groups.max()) + 1
    here = sorted(set(groups.tolist()))
    losses = torch.stack([v[groups == g].sum() / n[groups == g].sum() for g in here])
    weight = (eta * losses.detach()).softmax(0) * len(here) / num_groups
    return weight @ losses


def quadratic(told):
    v, n = taking_part(told)
    return (v * v).sum() / n.sum() + 0.1 * v.mean() ** 2


def info_nce(told):
    near = told.values @ told.values.T / 0.5
    near = near - 9 * torch.eye(len(near), dtype=near.dtype)
    return F.cross_entropy(near, (torch.arange(len(near)) + 1) % len(near))


def embeddings(model: nn.Module, batch: Any) -> Told:
    """[B, k] on the unit sphere, from the outputs of any problem's model."""
    outputs = model(batch[0])
    return Told(F.normalize(outputs.mean(1) if outputs.ndim == 3 else outputs, dim=1))


@dataclass(frozen=True)
class Scheme:
    """A reduction of the library and the same formula in torch."""

    reduction: Any
    formula: Callable[[Told], Tensor]
    pack: Callable[[Told], Any] = lambda told: ab.ExampleLosses(*told)
    tell: Callable[[nn.Module, Any], Told] | None = None


def square(told: Told) -> Told:
    return told._replace(values=told.values**2)


SCHEMES = {
    "mean": Scheme(ab.Mean(), mean),
    "sum": Scheme(ab.Sum(), lambda told: taking_part(told)[0].sum()),
    "max": Scheme(ab.Max(), maximum),
    "top fraction": Scheme(ab.TopFraction(0.3), top_fraction),
    "tilted": Scheme(ab.Tilted(0.7), tilted),
    "group dro": Scheme(ab.GroupDRO(0.5), group_dro),
    "function": Scheme(
        lambda losses: quadratic(Told(losses.values, losses.counts, losses.groups)), quadratic
    ),
    "scaled": Scheme(0.3 * ab.Mean(), lambda told: 0.3 * mean(told)),
    "terms": Scheme(
        {"data": ab.Mean(), "square": 0.2 * ab.Tilted(0.7)},
        lambda told: mean(told) + 0.2 * tilted(square(told)),
        pack=lambda told: {
            "data": ab.ExampleLosses(*told),
            "square": ab.ExampleLosses(*square(told)),
        },
    ),
    "contrastive": Scheme(lambda losses: info_nce(Told(losses.values)), info_nce, tell=embeddings),
}
SPLITS = ["whole", "equal", "ragged", "singletons", "unequal", "masked apart"]


@dataclass(frozen=True)
class Case:
    """One generated problem with its split."""

    number: int

    @property
    def problem_name(self) -> str:
        return list(PROBLEMS)[self.number % len(PROBLEMS)]

    @property
    def scheme_name(self) -> str:
        return list(SCHEMES)[self.number % len(SCHEMES)]  # 7 and 10: every pair by case 70

    @property
    def split(self) -> str:
        return SPLITS[(self.number + self.number // 10) % len(SPLITS)]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.number // 70 == 1 else torch.float64

    @property
    def absent(self) -> range | None:
        """A run of examples that do not count, a whole grain of them."""
        return range(3, 6) if self.split == "masked apart" or self.number % 3 == 0 else None

    def problem(self) -> Problem:
        build = PROBLEMS[self.problem_name]
        return build(12 + self.number % 2, self.dtype, self.number, self.absent)

    def layout(self, problem: Problem) -> ab.Layout:
        """Sizes in examples; whole grains where the model needs them."""
        grain = problem.grain or 1
        if self.split == "unequal":
            edges = grain_edges(problem.size, grain) if grain > 1 else range(problem.size + 1)
            rng = np.random.default_rng(self.number)
            inner = sorted(rng.choice(edges[1:-1], min(3, len(edges) - 2), replace=False))
            return ab.Layout(tuple(int(b - a) for a, b in pairwise([0, *inner, problem.size])))
        sizes = {"whole": None, "equal": 6, "ragged": 9 if grain > 1 else 5, "singletons": grain}
        return ab.Layout(sizes.get(self.split, (3, 3, problem.size - 6)))

    def __str__(self) -> str:
        return f"{self.number}-{self.problem_name}-{self.scheme_name}-{self.split}".replace(
            " ", "_"
        )


def penalised(model: nn.Module, formula: Callable[[Told], Tensor], told: Told) -> Tensor:
    """R + (0.1/2) sum w^2 over the weights + 0.05 sum |w| over the biases."""
    named = dict(model.named_parameters())
    squares = sum(p.square().sum() for name, p in named.items() if "weight" in name)
    sizes = sum(p.abs().sum() for name, p in named.items() if "bias" in name)
    return formula(told) + 0.05 * squares + 0.05 * sizes


@pytest.mark.parametrize("number", range(210), ids=lambda number: str(Case(number)))
def test_a_split_batch_has_the_gradient_of_the_whole(number):
    case = Case(number)
    problem = case.problem()
    scheme = SCHEMES[case.scheme_name]
    tell = scheme.tell or problem.tell
    has_penalty = number % 2 == 0
    omega = ab.L2(0.1, on="*weight*") + ab.L1(0.05, on="*bias*") if has_penalty else None
    truth = oracle(
        Problem(problem.model, problem.batch, tell, problem.grain),
        lambda model, told: (
            penalised(model, scheme.formula, told) if has_penalty else scheme.formula(told)
        ),
    )
    model = copy.deepcopy(problem.model)
    objective = ab.Objective(
        lambda model, batch: scheme.pack(tell(model, batch)),
        scheme.reduction,
        omega,
        grain=problem.grain,
    )
    found = ab.batch_gradient(model, objective, problem.batch, key=KEY, layout=case.layout(problem))
    bound = BOUND[case.dtype]
    assert distance(flat_gradient(model), truth.gradient) <= bound
    assert abs(found.loss - truth.loss) <= bound * max(1, abs(truth.loss))
    for name, buffer in model.named_buffers():
        assert (buffer - truth.buffers[name]).abs().max() <= bound * truth.buffers[name].abs().max()
