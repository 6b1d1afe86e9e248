"""Objective: checks of `example_losses`, and relations of sum, mean and penalty.

The relations of sum and mean are checked on gradients: the engine on one side, one plain
backward pass of the expression itself on the other.
"""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import anybatch as ab
from anybatch.errors import LayoutError, LossError
from anybatch.objective import Objective
from anybatch.reductions import Function, Scaled
from properties import seeded_examples

seeded = seeded_examples(40)


def returning(losses, reduction=None, **more):
    """Return the losses of 4 examples as an objective checks them."""
    options = {} if reduction is None else {"reduction": reduction}
    return Objective(lambda model, batch: losses, **options, **more).losses(nn.Identity(), None, 4)


# ---------------------------------------------------------------------------------- the terms


def test_a_single_term_is_called_data():
    objective = Objective(lambda model, batch: batch)
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    losses = objective.losses(nn.Identity(), values, 4)
    assert objective.reductions == {"data": ab.Mean()}
    assert losses["data"].values is values
    assert objective.reduce(losses)["data"].value == 3


def test_each_named_term_has_its_own_reduction_and_state():
    reduction = {
        "tokens": 0.5 * ab.Sum(),
        "fair": ab.GroupDRO(1.0),
        "own": lambda t: t.values.max(),
    }
    objective = Objective(lambda model, batch: batch, reduction)
    grouped = ab.ExampleLosses(torch.tensor([1.0, 3.0]), groups=torch.tensor([0, 1]))
    batch = {"own": torch.tensor([4.0, 9.0]), "fair": grouped, "tokens": torch.tensor([1.0, 5.0])}
    losses = objective.losses(nn.Identity(), batch, 2)
    assert list(losses) == list(reduction)  # in the order declared, not in the one returned
    reduced = objective.reduce(losses, {"fair": torch.tensor([0.0, 1.0]).double()})
    assert {name: r.value.item() for name, r in reduced.items() if name != "fair"} == {
        "tokens": 3,
        "own": 9,
    }
    again = objective.reduce(losses, {name: r.state for name, r in reduced.items()})
    assert reduced["tokens"].state is None
    # q = (1/2, 1/2) after the new group enters, tilted by exp(L): (1, e^2), then (1, e^4).
    assert math.isclose(reduced["fair"].state[1], math.exp(2) / (1 + math.exp(2)), rel_tol=1e-14)
    assert math.isclose(again["fair"].state[1], math.exp(4) / (1 + math.exp(4)), rel_tol=1e-14)


def test_a_function_is_a_reduction_and_a_scaled_one_stays_scaled():
    def worst(losses):
        return losses.values.max()

    reductions = Objective(len, {"a": worst, "b": 0.1 * ab.Mean()}).reductions
    assert reductions == {"a": Function(worst), "b": Scaled(0.1, ab.Mean())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_widened_with_their_graph(dtype):
    weight = torch.ones(4, dtype=dtype, requires_grad=True)
    counts = torch.ones(4)
    losses = returning(ab.ExampleLosses(weight * 3, counts, metrics={"hits": counts}))["data"]
    assert losses.values.dtype == torch.float32
    assert losses.counts is counts
    assert losses.metrics["hits"] is counts
    losses.values.sum().backward()
    assert weight.grad.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_values_pass_as_they_are(dtype):
    values = torch.ones(4, dtype=dtype)
    assert returning(values)["data"].values is values


def test_rows_of_values_pass_to_a_reduction_that_couples_examples_alone():
    rows = torch.ones(4, 7)
    assert returning(rows, lambda losses: losses.values.sum())["data"].values is rows
    assert returning(rows, 2 * Function(lambda losses: losses.values.sum()))["data"].values is rows
    with pytest.raises(
        LossError, match=r"returned shape \(4, 7\) .* one loss per example, shape \(4,\)"
    ):
        returning(rows, ab.Mean())


# --------------------------------------------------------------------- losses that are refused


@pytest.mark.parametrize(
    ("losses", "shape"),
    [
        (torch.tensor(1.0), r"\(\)"),  # the default of every loss of torch, reduction='mean'
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(4, 1), r"\(4, 1\)"),
        (torch.ones(4, 5, 2), r"\(4, 5, 2\)"),
        (ab.ExampleLosses(torch.ones(1, 4)), r"\(1, 4\)"),
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused_with_what_to_do(losses, shape):
    message = (
        rf"^example_losses returned shape {shape} for a batch of 4 examples\. It must return one "
        r"loss per example, shape \(4,\)\. Use reduction='none' in the loss, and sum the terms of "
        r"one example \(tokens, pixels\) and return counts\.$"
    )
    with pytest.raises(LossError, match=message):
        returning(losses)


@pytest.mark.parametrize(("shape", "is_squeezed"), [((), True), ((1, 1), False), ((2,), False)])
def test_squeeze_is_named_where_it_removes_the_dimension_of_one_example(shape, is_squeezed):
    objective = Objective(lambda model, batch: torch.ones(shape))
    with pytest.raises(LossError, match="for a batch of 1 examples") as refusal:
        objective.losses(nn.Identity(), None, 1)
    assert ("write squeeze(-1)" in str(refusal.value)) == is_squeezed


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (torch.ones(4, dtype=torch.int64), "returned torch.int64 .* must return floating-point"),
        (torch.ones(4, dtype=torch.bool), "returned torch.bool .* must return floating-point"),
        (
            3.0,
            "returned a float for the term 'data'. It must return a tensor of one loss per example",
        ),
        (np.ones(4), "returned a ndarray for the term 'data'. It must return a tensor"),
        (
            (torch.ones(4), torch.ones(4)),
            "returned a tuple for the term 'data'. It must return a tensor",
        ),
        (None, "returned a NoneType for the term 'data'. It must return a tensor"),
    ],
)
def test_a_loss_of_the_wrong_type_is_refused(losses, message):
    with pytest.raises(LossError, match=message):
        returning(losses)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"counts": torch.ones(3)},
            r"counts .*'data': .*shape \(3,\).*shape \(4,\), one number per",
        ),
        ({"counts": torch.ones(4, 1)}, r"counts of the term 'data': .* shape \(4, 1\)"),
        (
            {"counts": [1, 1, 1, 1]},
            "counts of the term 'data': .* returned list. It must be a tensor",
        ),
        (
            {"groups": torch.ones(5)},
            r"groups of the term 'data': .* returned a tensor of shape \(5,\)",
        ),
        ({"metrics": {"hit": torch.tensor(0.5)}}, r"the metric 'hit' of .* tensor of shape \(\)"),
        ({"metrics": {"hit": 0.5}}, "the metric 'hit' of .* returned float. It must be a tensor"),
    ],
)
def test_what_comes_with_the_values_is_one_an_example_too(more, message):
    with pytest.raises(LossError, match=message):
        returning(ab.ExampleLosses(torch.ones(4), **more))


@pytest.mark.parametrize(
    ("losses", "reduction", "message"),
    [
        ({"a": torch.ones(4)}, {"b": ab.Mean()}, r"terms \['a'\], but .* the terms \['b'\]"),
        ({"a": torch.ones(4)}, ab.Mean(), r"terms \['a'\], but .* has one, unnamed\. Give each"),
        (torch.ones(4), {"a": ab.Mean()}, r"returned one, unnamed, but .* the terms \['a'\]\."),
        ({}, ab.Mean(), r"returned the terms \[\], but the objective has one, unnamed"),
        ({"a": torch.ones(4)}, {"a": ab.Mean(), "b": ab.Sum()}, r"\['a'\], but .* \['a', 'b'\]"),
    ],
)
def test_terms_without_a_reduction_and_reductions_without_a_term_are_refused(
    losses, reduction, message
):
    with pytest.raises(LossError, match=message):
        returning(losses, reduction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "mean"}, "is 'mean'. It must be a reduction"),
        ({"reduction": ab.Mean}, r"is the class Mean. Write Mean\(\.\.\.\), with parentheses"),
        ({"reduction": {"a": ab.Mean(), "b": None}}, "is None. It must be a reduction"),
        ({"reduction": {}}, "is an empty dict. Give at least one term a reduction"),
        ({"penalty": ab.L2(0.1, name="data")}, "A term and a penalty are both called 'data'"),
        (
            {"reduction": {"L1": ab.Mean()}, "penalty": ab.L2(0.1) + ab.L1(0.1)},
            "A term and a penalty are both called 'L1'. Each needs its own name. Rename the term",
        ),
        ({"penalty": 5e-4}, r"is 0\.0005. It must be a penalty such as ab\.L2\(5e-4\)"),
        ({"penalty": 0.0}, r"is 0\.0. It must be a penalty such as ab\.L2\(5e-4\)"),
        ({"penalty": ab.L2}, r"is <class .*. It must be a penalty such as ab\.L2\(5e-4\)"),
        ({"penalty": [ab.L2(0.1)]}, r"is \[L2.*several added with \+, or None"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused_at_once(options, message):
    with pytest.raises(LossError, match=message):
        Objective(len, **options)


@pytest.mark.parametrize("grain", [0, -1, True, False, 32.0, 2.5, "32"])
def test_a_grain_that_is_no_number_of_examples_is_refused(grain):
    with pytest.raises(LayoutError, match=re.escape(f"grain is {grain!r}. It must be None")):
        Objective(len, grain=grain)


@pytest.mark.parametrize("grain", [None, 1, 32, np.int64(32)])
def test_a_grain_is_none_or_a_number_of_examples(grain):
    assert Objective(len, grain=grain).grain == grain


# ------------------------------------------------------------------- sum, mean and the penalty


def problem(size, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return model, (torch.randn(size, 3, dtype=dtype), torch.randint(2, (size,)))


def cross_entropies(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_engine(model, batch, reduction, penalty=None):
    objective = Objective(cross_entropies, reduction, penalty)
    gradient = ab.batch_gradient(model, objective, batch, layout=ab.Layout(micro_batch=3))
    return gradient, flat_gradient(model)


def by_autograd(model, expression):
    model.zero_grad()
    expression.backward()
    return expression.detach(), flat_gradient(model)


def square_weights(model):
    """sum w^2 / 2, weights alone."""
    return sum(p.square().sum() / 2 for name, p in model.named_parameters() if "weight" in name)


@seeded
@given(size=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_sum_and_its_gradient_are_b_times_the_mean_and_its_gradient(size, seed):
    model, batch = problem(size, seed)
    total, of_sum = by_engine(model, batch, ab.Sum())
    mean, of_mean = by_engine(model, batch, ab.Mean())
    # Tolerance: sums of 12 terms in float64, in the same order on both sides.
    torch.testing.assert_close(total.loss, size * mean.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(of_sum, size * of_mean, rtol=1e-14, atol=1e-15)
    value, expected = by_autograd(model, cross_entropies(model, batch).sum())
    torch.testing.assert_close(total.loss, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(of_sum, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("reduce", "reduction"), [(torch.mean, ab.Mean()), (torch.sum, ab.Sum())], ids=["mean", "sum"]
)
def test_a_penalty_inside_reduce_mean_is_itself_and_inside_reduce_sum_b_times_itself(
    reduce, reduction
):
    # TensorFlow's reduce_mean(loss + beta * reg) and reduce_sum(loss + beta * reg).
    model, batch = problem(10)
    beta, contents = 0.3, 1 if reduce is torch.mean else 10
    value, expected = by_autograd(
        model, reduce(cross_entropies(model, batch) + beta * square_weights(model))
    )
    gradient, got = by_engine(model, batch, reduction, ab.L2(beta * contents))
    # Tolerance: sums of 10 terms in float64.
    torch.testing.assert_close(gradient.loss, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    wrong = by_engine(model, batch, reduction, ab.L2(beta * 10 / contents))[1]
    assert (wrong - expected).norm() > 0.1 * expected.norm()


def repeat_batch(batch, times):
    return tuple(leaf.repeat(times, *[1] * (leaf.ndim - 1)) for leaf in batch)


@pytest.mark.parametrize("times", [2, 10])
def test_a_penalty_keeps_its_proportion_under_mean_and_falls_as_one_over_b_under_sum(times):
    # The same examples several times: the data term of the mean is the same at both sizes.
    model, batch = problem(6)
    larger = repeat_batch(batch, times)

    def proportion(batch, reduction):
        parts = by_engine(model, batch, reduction, ab.L2(0.3))[0].parts
        return (parts["L2"] / parts["data"]).item()

    # Tolerance: sums of 60 terms in float64.
    rest = proportion(batch, ab.Mean())
    assert math.isclose(proportion(larger, ab.Mean()), rest, rel_tol=1e-13)
    fallen = proportion(batch, ab.Sum()) / times
    assert math.isclose(proportion(larger, ab.Sum()), fallen, rel_tol=1e-13)
    assert fallen < rest / times  # the sum was off by 6 from the start


def test_under_mean_the_gradient_does_not_grow_with_the_batch_and_under_sum_it_does():
    model, batch = problem(6)
    for reduction, growth in ((ab.Mean(), 1), (ab.Sum(), 10)):
        small, large = (by_engine(model, b, reduction)[1] for b in (batch, repeat_batch(batch, 10)))
        torch.testing.assert_close(large, growth * small, rtol=1e-12, atol=1e-14)


def test_parts_add_up_to_the_loss_by_name():
    model, batch = problem(5)
    gradient, _ = by_engine(model, batch, ab.Mean(), ab.L2(0.1) + ab.L1(0.2, on="0.weight"))
    data = cross_entropies(model, batch).mean()
    l1 = 0.2 * model[0].weight.abs().sum()
    expected = {"data": data, "L2": 0.1 * square_weights(model), "L1(0.weight)": l1}
    assert list(gradient.parts) == list(expected)
    for name, part in gradient.parts.items():
        torch.testing.assert_close(part, expected[name].detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient.loss, sum(gradient.parts.values()), rtol=1e-15, atol=0)
    assert not gradient.loss.requires_grad
