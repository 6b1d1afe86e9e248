"""GroupDRO against its published algorithm, and functions of the user's against formulas by hand.

These reductions see more than values and counts: groups, state, or rows that couple.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anybatch.errors import LossError
from anybatch.example_losses import ExampleLosses
from anybatch.reductions import GroupDRO, as_reduction
from losses_to_reduce import losses_of, seeded

# ----------------------------------------------------------------------------------- GroupDRO


def algorithm_1(eta, steps, num_groups):
    """Sagawa et al. 2020, algorithm 1, with each group's mean over the batch: (R, q) a step."""
    q = [1 / num_groups] * num_groups
    for values, groups in steps:
        loss = []
        for g in range(num_groups):
            local = [v for v, group in zip(values, groups, strict=True) if group == g]
            loss.append(sum(local) / len(local))
        q = [q_g * math.exp(eta * loss_g) for q_g, loss_g in zip(q, loss, strict=True)]
        q = [q_g / sum(q) for q_g in q]
        yield sum(q_g * loss_g for q_g, loss_g in zip(q, loss, strict=True)), q


def test_group_dro_follows_algorithm_1_step_by_step():
    rng = np.random.default_rng(0)
    steps = [(rng.normal(size=9) + [0, 1, 2] * 3, [0, 1, 2] * 3) for _ in range(6)]
    state = None
    for (values, groups), (value, q) in zip(steps, algorithm_1(0.7, steps, 3), strict=True):
        reduced = GroupDRO(0.7).reduce(losses_of(values, groups=groups), state)
        state = reduced.state
        # Tolerance: some 30 roundings in float64 of numbers about 1.
        assert math.isclose(reduced.value, value, rel_tol=1e-13)
        np.testing.assert_allclose(state, q, rtol=1e-13)
        np.testing.assert_allclose(reduced.coefficients, np.array(q)[groups] / 3, rtol=1e-13)
    stale = [q for _, q in algorithm_1(0.7, [*steps[:-1], steps[0]], 3)][-1]
    assert not np.allclose(state, stale)  # the comparison tells another last batch apart


def test_group_losses_are_token_means_of_each_group():
    losses = losses_of([2.0, 4.0, 9.0], counts=[1.0, 3.0, 2.0], groups=[0, 0, 1])
    reduced = GroupDRO(0.0).reduce(losses)
    assert reduced.value == 0.5 * 6 / 4 + 0.5 * 9 / 2
    assert reduced.coefficients.tolist() == [0.5 / 4, 0.5 / 4, 0.5 / 2]


GROUPED = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


@seeded
@given(steps=GROUPED, eta=st.sampled_from([0.0, 0.1, 5.0]))
def test_groups_that_are_absent_keep_their_weight_and_new_ones_get_an_equal_share(steps, eta):
    state, history = None, set()
    for step in steps:
        groups, values = zip(*step, strict=True)
        here = set(groups)
        before = None if state is None else state.clone()
        q = GroupDRO(eta).reduce(losses_of(values, groups=groups), state).state
        assert before is None or torch.equal(state, before)  # state goes in unchanged
        # Tolerance: a softmax over six groups and one product, at each of six steps.
        assert math.isclose(q.sum(), 1, rel_tol=1e-14)
        assert {g for g, q_g in enumerate(q) if q_g > 0} == history | here
        if here <= history:
            assert all(q[g] == state[g] for g in history - here)
        if here.isdisjoint(history):
            assert math.isclose(q[[*here]].sum(), len(here) / len(here | history), rel_tol=1e-14)
        state, history = q, history | here
    if eta == 0:  # equal shares stay equal
        np.testing.assert_allclose(state[sorted(history)], 1 / len(history), rtol=1e-14)


def test_numbers_that_no_group_has_take_no_weight():
    reduced = GroupDRO(0.0).reduce(losses_of([1.0, 3.0], groups=[2, 7]))
    assert reduced.value == 2
    assert reduced.state.tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_losses_leave_group_dro_finite_and_every_group_alive(dtype):
    first = GroupDRO(1.0).reduce(losses_of([1e30, -1e30], dtype=dtype, groups=[0, 1]))
    assert first.value == torch.tensor(1e30, dtype=dtype)
    assert first.state.sum() == 1
    alone = GroupDRO(1.0).reduce(losses_of([5.0], dtype=dtype, groups=[1]), first.state)
    assert alone.value.isfinite()
    assert torch.equal(alone.state[:1], first.state[:1])
    back = GroupDRO(1.0).reduce(losses_of([-1e30, 1e30], dtype=dtype, groups=[0, 1]), first.state)
    assert back.state[1] == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "received no groups. Return ExampleLosses"),
        (torch.tensor([0.0, 1.0]), "received groups of torch.float32. Return .* of integers"),
        (torch.tensor([0, -1]), "received the group -1. Groups count from 0"),
    ],
)
def test_groups_that_group_dro_cannot_use_are_refused(groups, message):
    with pytest.raises(LossError, match=message):
        GroupDRO(0.1).reduce(ExampleLosses(torch.ones(2), groups=groups))


# ----------------------------------------------------------------------------------- functions


def test_a_function_may_couple_rows_of_numbers():
    # R = |mean row|^2 + (1/B^2) sum_ij |z_i - z_j|^2; by hand dR/dz_i = 2 a / B + 4 (z_i - a) / B.
    def couple(losses):
        z = losses.values
        return z.mean(0).square().sum() + (z[:, None] - z[None]).square().sum() / len(z) ** 2

    z = np.random.default_rng(0).normal(size=(6, 3))
    a = z.mean(0)
    reduced = as_reduction(couple).reduce(losses_of(z))
    # Tolerance: sums over 36 pairs in float64.
    np.testing.assert_allclose(reduced.coefficients, (2 * a + 4 * (z - a)) / 6, rtol=1e-12)
    pairs = sum(((x - y) ** 2).sum() for x in z for y in z) / 36
    assert math.isclose(reduced.value, (a**2).sum() + pairs, rel_tol=1e-13)


def test_a_function_sees_counts_and_groups_of_the_examples_that_take_part():
    history = []

    def function(losses):
        history.append(losses)
        return losses.values.sum()

    losses = ExampleLosses(
        torch.ones(3, 2), torch.tensor([2.0, 0.0, 1.0]), torch.arange(3), {"a": torch.arange(3.0)}
    )
    c = as_reduction(function).reduce(losses).coefficients
    assert c.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert history[0].counts.tolist() == [2, 1]
    assert history[0].groups.tolist() == history[0].metrics["a"].tolist() == [0, 2]


@pytest.mark.parametrize(
    "function",
    [lambda losses: torch.tensor(3.0), lambda losses: losses.values.detach().sum()],
)
def test_a_function_that_does_not_depend_on_the_values_has_coefficients_of_zero(function):
    reduced = as_reduction(function).reduce(losses_of([1.0, 2.0]))
    assert reduced.value == 3
    assert reduced.coefficients.tolist() == [0, 0]


def test_a_function_of_the_values_works_where_gradients_are_switched_off():
    with torch.no_grad():
        reduced = as_reduction(lambda losses: losses.values.prod()).reduce(losses_of([2.0, 5.0]))
    assert reduced.coefficients.tolist() == [5, 2]
    assert not reduced.value.requires_grad


@pytest.mark.parametrize("use", [lambda v, s: (v / s).sum(), lambda v, s: s.sum()])
def test_a_trainable_tensor_inside_a_function_is_refused(use):
    scale = nn.Parameter(torch.ones(1))
    function = as_reduction(lambda losses: use(losses.values, scale))
    with pytest.raises(LossError, match=r"trainable tensor of shape \(1,\).*in example_losses"):
        function.reduce(losses_of([1.0, 2.0]))
    scale.requires_grad_(False)
    assert function.reduce(losses_of([1.0, 2.0])).value == use(torch.tensor([1.0, 2.0]), scale)


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda losses: losses.values, r"\(2,\)"),
        (lambda losses: losses.values.sum(0, keepdim=True), r"\(1,\)"),
        (lambda losses: losses.values.sum().item(), "float"),
        (lambda losses: None, "NoneType"),
    ],
)
def test_a_function_that_returns_no_scalar_tensor_is_refused(function, came):
    with pytest.raises(LossError, match=f"returned {came}. It must return a 0-d tensor"):
        as_reduction(function).reduce(losses_of([1.0, 2.0]))
