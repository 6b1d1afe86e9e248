"""`evaluate`: the reduction over a whole data set, with nothing else changed.

The oracle is torch on the whole data set at once: the formulas of each reduction written out by
hand in float64. Data and models are float64, so 1e-12 is the order of summation.
"""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import BatchError, DataError, LayoutError
from nested_states import same

N = 37


def problem():
    """A linear model, inputs, targets, and a count an example, of which some are 0."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=torch.float64)
    inputs = torch.randn(N, 5, dtype=torch.float64)
    return model, (inputs, torch.arange(N) % 3, torch.arange(N) % 4)


def sums(model, batch):
    """Losses and hits summed over an example's own terms, and how many these are."""
    inputs, targets, counts = batch
    outputs = model(inputs)
    losses = F.cross_entropy(outputs, targets, reduction="none") * counts
    hits = (outputs.argmax(1) == targets) * counts
    return ab.ExampleLosses(losses, counts=counts, metrics={"accuracy": hits})


def by_hand(model, batch):
    """m and n of the examples that take part."""
    inputs, targets, counts = batch
    with torch.no_grad():
        m = -model(inputs).log_softmax(1)[torch.arange(len(targets)), targets]
    return m[counts > 0], counts[counts > 0].double()


def top_fraction(m, n, q):
    k = q * len(m)
    ordered = sorted(m.tolist(), reverse=True)
    return (sum(ordered[: int(k)]) + (k - int(k)) * ordered[int(k)]) / k


@pytest.mark.parametrize("micro_batch", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize(
    ("reduction", "formula"),
    [
        (ab.Mean(), lambda m, n: (m * n).sum() / n.sum()),
        (ab.Sum(), lambda m, n: (m * n).sum()),
        (0.5 * ab.Mean(), lambda m, n: (m * n).sum() / n.sum() / 2),
        (ab.Max(), lambda m, n: m.max()),
        (ab.TopFraction(0.3), lambda m, n: top_fraction(m, n, 0.3)),
        (ab.Tilted(2.0), lambda m, n: (2 * m).exp().mean().log() / 2),
    ],
    ids=("mean", "sum", "half a mean", "max", "top fraction", "tilted"),
)
def test_the_loss_is_the_reduction_over_the_whole_set(reduction, formula, micro_batch):
    model, data = problem()
    objective = ab.Objective(sums, reduction=reduction, penalty=ab.L2(0.1))
    evaluation = ab.evaluate(model, objective, data, micro_batch=micro_batch)
    value = float(formula(*by_hand(model, data)))
    penalty = 0.05 * model.weight.detach().square().sum().item()
    assert evaluation.parts == pytest.approx({"data": value, "L2": penalty}, rel=1e-12)
    assert evaluation.loss == pytest.approx(value + penalty, rel=1e-12)
    assert evaluation.num_examples == N


def test_a_mean_of_micro_batch_means_is_another_number():
    """Control: the tolerance tells them apart."""
    model, data = problem()
    m, n = by_hand(model, data)
    parts = [(a, b) for a, b in zip(m.split(5), n.split(5), strict=True)]
    wrong = torch.stack([(a * b).sum() / b.sum() for a, b in parts]).mean().item()
    assert wrong != pytest.approx(((m * n).sum() / n.sum()).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.bfloat16])
@pytest.mark.parametrize(("hits", "total"), [(9, 10), (1, 3), (7, 49), (613, 1000)])
def test_a_proportion_is_hits_over_n_to_the_last_bit(dtype, hits, total):
    def losses(model, batch):
        return ab.ExampleLosses(model(batch)[:, 0], metrics={"hit": (batch[:, 0] > 0).to(dtype)})

    data = torch.zeros(total, 1).index_fill(0, torch.arange(hits), 1.0)
    evaluation = ab.evaluate(nn.Linear(1, 1), ab.Objective(losses), data, micro_batch=64)
    assert evaluation.metrics == {"hit": hits / total}


def test_sums_and_counts_beyond_the_integers_of_float32_are_exact():
    def losses(model, batch):
        metrics = {"odd": batch[:, 0], "even": batch[:, 1]}
        return ab.ExampleLosses(model(batch)[:, 0], counts=batch[:, 2], metrics=metrics)

    data = torch.tensor([[2.0**24, 2.0**24, 2.0**24], [1.0, 0.0, 1.0]])
    evaluation = ab.evaluate(nn.Linear(3, 1), ab.Objective(losses), data, micro_batch=1)
    assert evaluation.metrics == {"odd": 1.0, "even": 2**24 / (2**24 + 1)}


def test_float32_would_round_proportions_and_sums():
    """Control for the tests above."""
    assert (torch.tensor(9.0) / torch.tensor(10.0)).item() != 9 / 10
    assert torch.tensor([2.0**24, 1.0]).sum() == 2.0**24


def test_metrics_are_weighted_by_counts_and_named_by_term():
    def terms(model, batch):
        return {"tokens": sums(model, batch), "other": sums(model, (*batch[:2], batch[2] + 1))}

    model, data = problem()
    hits = (model(data[0]).argmax(1) == data[1]).long()
    expected = {
        f"{name}.accuracy": (hits * n).sum().item() / n.sum().item()
        for name, n in {"tokens": data[2], "other": data[2] + 1}.items()
    }
    objective = ab.Objective(terms, reduction={"tokens": ab.Mean(), "other": ab.Max()})
    evaluation = ab.evaluate(model, objective, data, micro_batch=10)
    assert evaluation.metrics == expected
    assert set(evaluation.parts) == {"tokens", "other"}


class Restless(nn.Module):
    """Draws from every generator and changes its buffers, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.layers[1].eval()  # frozen statistics
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2))

    def forward(self, inputs):
        self.calls += 1
        self.cache = self.cache + 1
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        if len(inputs) == 2:
            raise ZeroDivisionError("in the last micro-batch")
        return self.layers(inputs) + noise


def everything(model):
    return {
        "model": dict(model.state_dict()),
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate()[1],
    }


def squares(model, batch):
    return model(batch).square().sum(1)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_buffers_and_generators_are_as_before_on_errors_too(fails):
    model = Restless()
    data, objective = torch.randn(12 if fails else 10, 5), ab.Objective(squares)
    before = copy.deepcopy(everything(model))
    if fails:
        with pytest.raises(ZeroDivisionError, match="in the last micro-batch"):
            ab.evaluate(model, objective, data, micro_batch=5)
    else:
        ab.evaluate(model, objective, data, micro_batch=5)
    assert same(everything(model), before)
    assert before["training"] == [True, True, True, False, True]


def test_a_model_that_draws_even_so_draws_the_same_each_time():
    model, data, objective = Restless(), torch.randn(10, 5), ab.Objective(squares)
    first = ab.evaluate(model, objective, data, micro_batch=5)
    torch.rand(3)
    assert ab.evaluate(model, objective, data, micro_batch=5) == first


def test_the_model_is_in_evaluation_mode_without_a_graph():
    def losses(model, batch):
        sizes.append((model.training, model[1].training, torch.is_grad_enabled()))
        return model(batch).sum(1)

    sizes = []
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5))
    ab.evaluate(model, ab.Objective(losses), torch.randn(10, 5), micro_batch=6)
    assert sizes == [(False, False, False)] * 2
    assert all(p.grad is None for p in model.parameters())


def test_each_micro_batch_is_collated_to_its_own_padding():
    def collate(rows):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def losses(model, batch):
        shapes.append(tuple(batch.shape))
        return ab.ExampleLosses(batch.sum(1), counts=(batch > 0).sum(1))

    shapes, rows = [], [torch.ones(length) for length in (1, 4, 2, 2, 3)]
    evaluation = ab.evaluate(
        nn.Identity(), ab.Objective(losses), rows, micro_batch=2, collate=collate
    )
    assert shapes == [(2, 4), (2, 2), (1, 3)]
    assert evaluation.loss == 1.0


@pytest.mark.parametrize(
    ("data", "micro_batch", "error", "message"),
    [
        (torch.zeros(0, 5), 4, DataError, "data set to evaluate on is empty"),
        ([], 4, DataError, "data set to evaluate on is empty"),
        (torch.zeros(3, 5), 0, LayoutError, "micro_batch is 0. It must be a number of at least 1"),
        ((torch.zeros(3), torch.zeros(4)), 1, BatchError, r"data\[0\] has 3, data\[1\] has 4"),
        (iter([1]), 1, DataError, "without a length and an index by position"),
    ],
)
def test_data_that_cannot_be_evaluated_say_why(data, micro_batch, error, message):
    with pytest.raises(error, match=message):
        ab.evaluate(nn.Linear(5, 1), ab.Objective(squares), data, micro_batch=micro_batch)
