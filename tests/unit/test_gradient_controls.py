"""Classic mistakes, each far from the oracle that the engine agrees with; ties; contrastive losses.

Oracle: `cases.oracle`, plain autograd on the unsplit batch. A mistake must be off by more than
1 % of the gradient's norm, 10 orders above the bound of 1e-12 that the engine keeps in float64.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from cases import PROBLEMS, Problem, Values, distance, flat_gradient, oracle

BOUND, FAR = 1e-12, 0.01
CUTS = (9, 3)


def cuts_of(problem):
    return [tuple(leaf[a:b] for leaf in problem.batch) for a, b in ((0, 9), (9, 12))]


def mean(model, results):
    counts = torch.ones_like(results.values) if results.counts is None else results.counts
    return results.values.sum() / counts.sum()


def penalty(model):
    return 0.5 * sum(p.square().sum() for p in model.parameters())


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return flat_gradient(model)


def last_example_alone(model, problem):
    return gradient_of(model, problem.tell(model, problem.batch).values[-1])


def mean_error_times_mean_activation(model, problem):
    """Run one linear layer wrongly: averages are taken before the product."""
    inputs, targets, _ = problem.batch
    error = model(inputs).softmax(1) - F.one_hot(targets, 3)
    return torch.cat([torch.outer(error.mean(0), inputs.mean(0)).flatten(), error.mean(0)]).detach()


def mean_of_means(model, problem):
    parts = [mean(model, problem.tell(model, cut)) for cut in cuts_of(problem)]
    return gradient_of(model, sum(parts) / len(parts))


def count_missing(model, problem):
    return gradient_of(model, problem.tell(model, problem.batch).values.mean())


def accumulation_without_a_division(model, problem):
    return gradient_of(model, sum(mean(model, problem.tell(model, c)) for c in cuts_of(problem)))


def penalty_in_every_micro_batch(model, problem):
    data = mean(model, problem.tell(model, problem.batch))
    return gradient_of(model, data + len(CUTS) * penalty(model))


class SplitOverWinners(torch.autograd.Function):
    """2x2 pooling whose gradient goes to all winners of the batch, by how often each won."""

    @staticmethod
    def forward(ctx, x):
        pooled, winners = F.max_pool2d(x, 2, return_indices=True)
        ctx.save_for_backward(winners)
        ctx.shape = x.shape
        return pooled

    @staticmethod
    def backward(ctx, error):
        (winners,) = ctx.saved_tensors
        pixels = ctx.shape[2] * ctx.shape[3]
        share = F.one_hot(winners.flatten(2), pixels).to(error.dtype).mean(0)
        return torch.einsum("bcw,cwp->bcp", error.flatten(2), share).reshape(ctx.shape)


class Pooled(nn.Module):
    """Convolution, 2x2 pooling, linear."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(27, 3)
        self.pool = partial(F.max_pool2d, kernel_size=2)

    def forward(self, x):
        return self.after(self.pool(self.before(x)).flatten(1))


def pool_split_over_the_winners_of_the_batch(model, problem):
    model.pool = SplitOverWinners.apply
    return gradient_of(model, mean(model, problem.tell(model, problem.batch)))


def pooled(size, dtype, seed):
    images = PROBLEMS["convolution"](size, dtype, seed)
    return Problem(Pooled().to(dtype), images.batch, images.tell)


MISTAKES = [
    ("perceptron", last_example_alone),
    ("linear", mean_error_times_mean_activation),
    ("perceptron", mean_of_means),
    ("tokens", mean_of_means),
    ("tokens", count_missing),
    ("perceptron", accumulation_without_a_division),
    ("perceptron", penalty_in_every_micro_batch),
    ("pooled", pool_split_over_the_winners_of_the_batch),
]


@pytest.mark.parametrize(("name", "wrong"), MISTAKES)
def test_the_oracle_tells_the_classic_mistakes_from_the_engine(name, wrong):
    build = PROBLEMS.get(name, pooled)
    problem = build(12, torch.float64, 1)
    has_penalty = wrong is penalty_in_every_micro_batch
    truth = oracle(
        problem,
        lambda model, results: mean(model, results) + (penalty(model) if has_penalty else 0),
    )
    model = copy.deepcopy(problem.model)
    objective = ab.Objective(
        lambda model, batch: ab.ExampleLosses(*problem.tell(model, batch)),
        penalty=ab.L2(1, on="*") if has_penalty else None,
    )
    ab.batch_gradient(model, objective, problem.batch, layout=ab.Layout(CUTS))
    assert distance(flat_gradient(model), truth.gradient) <= BOUND
    assert distance(wrong(copy.deepcopy(problem.model), problem), truth.gradient) > FAR


@pytest.mark.parametrize("micro_batch", [None, 1, 2, (2, 1, 3)])
@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (ab.Max(), [4 / 3, 5 / 3]),  # three at 3, a third each
        (ab.TopFraction(1 / 3), [4 / 3, 5 / 3]),  # k = 2 of the three: 2/3 each, over 2
        (ab.TopFraction(0.75), [5.5 / 4.5, 6 / 4.5]),  # k = 4.5: those, then 2, then half of 1
    ],
)
def test_ties_share_equally_across_micro_batches(reduction, expected, micro_batch):
    # L_i = |w . x_i| = 1, 3, 3, 2, 3, 0 with gradients (1, 0), (0, 3), (3, 0), (1, 1), (1, 2), 0:
    # integers, so that ties are exact. Tolerance: the rounding of a quotient.
    inputs = torch.tensor([[1, 0], [0, 3], [-3, 0], [-1, -1], [1, 2], [0, 0]]).double()
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    objective = ab.Objective(lambda model, x: model(x)[:, 0].abs(), reduction)
    ab.batch_gradient(model, objective, inputs, layout=ab.Layout(micro_batch))
    assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-14, abs=0)


def two_views(size, dtype):
    """An encoder, and two noisy views of each example."""
    torch.manual_seed(0)
    x = torch.randn(size, 6)
    views = torch.stack([x + 0.3 * torch.randn(size, 6) for _ in range(2)], 1).to(dtype)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    return Problem(encoder, (views,), embed_inputs)


def embed_inputs(model, batch):
    """[B, 8]: both views' embeddings, each of length 1."""
    return Values(F.normalize(model(batch[0]), dim=2).flatten(1))


def info_nce(results, temperature=0.1):
    first, second = results.values.unflatten(1, (2, -1)).unbind(1)
    logits = first @ second.T / temperature
    each = torch.arange(len(logits))
    return (F.cross_entropy(logits, each) + F.cross_entropy(logits.T, each)) / 2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro_batch", [None, 1, 4, (7, 1, 3)])
def test_a_contrastive_loss_sees_all_negatives_of_the_batch_in_every_layout(
    micro_batch, dtype, limit
):
    problem = two_views(11, dtype)
    truth = oracle(problem, lambda model, results: info_nce(results))
    model = copy.deepcopy(problem.model)
    objective = ab.Objective(lambda model, batch: embed_inputs(model, batch).values, info_nce_of)
    result = ab.batch_gradient(model, objective, problem.batch, layout=ab.Layout(micro_batch))
    assert distance(flat_gradient(model), truth.gradient) <= limit
    assert result.coefficients.shape == (11, 8)
    assert result.loss == pytest.approx(truth.loss.item(), rel=limit)


def info_nce_of(losses):
    return info_nce(Values(losses.values))


def test_a_contrastive_loss_within_each_micro_batch_is_another_loss():
    problem = two_views(12, torch.float64)
    truth = oracle(problem, lambda model, results: info_nce(results))
    model = copy.deepcopy(problem.model)
    halves = [info_nce(embed_inputs(model, (problem.batch[0][a : a + 6],))) for a in (0, 6)]
    assert distance(gradient_of(model, sum(halves) / 2), truth.gradient) > FAR
