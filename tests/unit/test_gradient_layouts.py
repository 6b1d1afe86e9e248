"""Every layout gives the gradient of the unsplit batch.

Oracle: `cases.oracle`, plain autograd of R and Omega as `formulas` writes them, on the whole batch.
Tolerance: promise 1 of the design, 1e-12 in float64 and 1e-5 in float32, as the norm of the
difference over the norm: sums in another order differ by some units of rounding a term.
"""

import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

import anybatch as ab
from cases import PROBLEMS, SEED, STEP, Problem, distance, flat_gradient, grain_edges, oracle
from formulas import SCHEMES, add_penalty

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
KEY = ab.Key(seed=SEED, step=STEP)
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


@pytest.mark.fast(41)
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
        lambda model, results: (
            add_penalty(model, scheme.formula, results) if has_penalty else scheme.formula(results)
        ),
    )
    model = copy.deepcopy(problem.model)
    objective = ab.Objective(
        lambda model, batch: scheme.pack(tell(model, batch)),
        scheme.reduction,
        omega,
        grain=problem.grain,
    )
    result = ab.batch_gradient(
        model, objective, problem.batch, key=KEY, layout=case.layout(problem)
    )
    limit = BOUND[case.dtype]
    assert distance(flat_gradient(model), truth.gradient) <= limit
    assert abs(result.loss - truth.loss) <= limit * max(1, abs(truth.loss))
    for name, buffer in model.named_buffers():
        assert (buffer - truth.buffers[name]).abs().max() <= limit * truth.buffers[name].abs().max()
