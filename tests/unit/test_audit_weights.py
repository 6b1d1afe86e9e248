"""`audit.weigh` and `audit.check`: the weight that a training step gives each example.

Oracle: the divisor that each step writes out. Each mistake is a real one, and the right step is the
control of all.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anybatch import audit
from anybatch.errors import AnybatchError

B = 6
COUNTS = torch.tensor([1.0, 5.0, 2.0, 3.0, 1.0, 4.0]).double()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def make_batch():
    torch.manual_seed(1)
    return torch.randn(B, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2]), COUNTS


def each(model, micro_batch):
    return F.cross_entropy(model(micro_batch[0]), micro_batch[1], reduction="none")


def total(micro_batches):
    return sum(len(batch[0]) for batch in micro_batches)


def mean(model, batch, batches):
    return each(model, batch).sum() / total(batches)


def add_up(model, batch, batches):
    return each(model, batch).sum()


def mean_of_means(model, batch, batches):
    return each(model, batch).mean() / len(batches)


def not_divided(model, batch, batches):
    return each(model, batch).mean()


def divide_twice(model, batch, batches):
    return each(model, batch).sum() / total(batches) / len(batches)


def weighted(model, batch, batches):
    return (each(model, batch) * batch[2]).sum() / sum(b[2].sum() for b in batches)


def weighted_mean_of_means(model, batch, batches):
    return (each(model, batch) * batch[2]).sum() / batch[2].sum() / len(batches)


def with_penalty_each_time(model, batch, batches):
    penalty = sum(p.square().sum() for p in model.parameters())
    return each(model, batch).sum() / total(batches) + 0.1 * penalty


def make_step(loss, model=None):
    model = model or make_model()

    def step(micro_batches):
        model.zero_grad()
        for batch in micro_batches:
            loss(model, batch, micro_batches).backward()
        return model

    return step


def means_of(sizes):
    return torch.cat([torch.full((n,), 1 / n / len(sizes)) for n in sizes]).double()


@pytest.mark.parametrize("sizes", [None, (6,), (2, 4), (1, 2, 3), (1,) * 6], ids=str)
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (mean, lambda sizes: torch.full((B,), 1 / B).double()),
        (add_up, lambda sizes: torch.ones(B).double()),
        (mean_of_means, means_of),
        (not_divided, lambda sizes: means_of(sizes) * len(sizes)),
        (divide_twice, lambda sizes: torch.full((B,), 1 / B / len(sizes)).double()),
        (weighted, lambda sizes: COUNTS / COUNTS.sum()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_are_those_that_the_step_writes(loss, expected, sizes):
    weights = audit.weigh(make_step(loss), make_batch(), micro_batches=sizes)
    assert torch.allclose(weights.values, expected(sizes or (B,)), atol=1e-9)
    assert weights.rest < 1e-9


def test_what_no_weights_explain_is_the_rest():
    step = make_step(with_penalty_each_time)
    assert audit.weigh(step, make_batch(), micro_batches=(3, 3)).rest > 0.01
    torch.manual_seed(0)
    coupled = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()

    def centre(model, batch, batches):
        logits = model(batch[0]) - model(batch[0]).mean(0) / 2
        return F.cross_entropy(logits, batch[1])

    assert audit.weigh(make_step(centre, coupled), make_batch()).rest > 0.01


MISTAKES = {
    "not divided": (not_divided, "not divided by the number of micro-batches"),
    "divided twice": (divide_twice, "the loss is divided twice"),
    "mean of means": (mean_of_means, "a mean of means"),
    "weighted mean of means": (weighted_mean_of_means, "no common factor fits"),
    "penalty each time": (with_penalty_each_time, "no common factor fits"),
}


@pytest.mark.parametrize(("loss", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_report_names_each_mistake(loss, words):
    report = audit.check(make_step(loss), make_batch())
    assert not report.is_invariant
    assert words in str(report)
    assert len(report.layouts) >= 3


@pytest.mark.parametrize("loss", [mean, add_up, weighted])
def test_a_right_step_has_no_defect(loss):  # the control
    report = audit.check(make_step(loss), make_batch())
    assert report.is_invariant
    assert "the same for every layout" in str(report)
    for finding in report.layouts:
        assert finding.difference < 1e-12
        assert finding.factor == pytest.approx(1)


def test_a_line_shows_what_an_example_weighs():
    report = audit.check(make_step(mean_of_means), make_batch(), micro_batches=[4])
    assert "4+2: " in str(report)
    assert "an example weighs 0.125 to 0.25" in str(report)


def test_a_notebook_shows_a_report_as_a_table():
    html = audit.check(make_step(mean_of_means), make_batch(), micro_batches=[4])._repr_html_()
    assert html.count("<tr>") == 2
    assert "a mean of means" in html
    assert ">4+2<" in html


def test_steps_that_cannot_be_compared_are_told_of():
    model = make_model()

    def accumulate(micro_batches):
        for batch in micro_batches:
            mean(model, batch, micro_batches).backward()
        return model

    assert "begin with model.zero_grad()" in str(audit.check(accumulate, make_batch()))

    def draw(micro_batches):
        model.zero_grad()
        for batch in micro_batches:
            (mean(model, batch, micro_batches) * torch.rand(())).backward()
        return model

    assert "draws random numbers" in str(audit.check(draw, make_batch()))


def test_examples_that_are_alike_have_no_weights_of_their_own():
    inputs, labels, counts = make_batch()
    inputs[3], labels[3] = inputs[0], labels[0]
    with pytest.raises(AnybatchError, match="cannot be told apart"):
        audit.weigh(make_step(mean), (inputs, labels, counts))
    report = audit.check(make_step(mean_of_means), (inputs, labels, counts))
    assert report.layouts[0].weights is None
    assert not report.is_invariant


@pytest.mark.parametrize("sizes", [(2, 2), (7,), ()], ids=str)
def test_sizes_that_are_not_the_batch_are_refused(sizes):
    with pytest.raises(AnybatchError, match="must add up"):
        audit.weigh(make_step(mean), make_batch(), micro_batches=sizes)
