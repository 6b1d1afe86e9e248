"""Penalties: which parameters they hold, and Omega with its gradient against autograd.

L2(a): (a/2) sum w^2        L1(a): a sum |w|
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anybatch.errors import ModelError
from anybatch.penalties import L1, L2, Penalties, add_gradients, compute_values, select_parameters
from properties import seeded_examples

seeded = seeded_examples(50)


class MyRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))


class Everything(nn.Module):
    """One layer of each kind; every name says whether the default rule holds it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv1d(2, 3, 2)
        self.embedding = nn.Embedding(5, 3)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.prelu = nn.PReLU()
        self.lstm = nn.LSTM(3, 2, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norms = nn.ModuleList(
            [nn.LayerNorm(4), nn.BatchNorm2d(3), nn.GroupNorm(1, 2), nn.RMSNorm(3), MyRMSNorm(3)]
        )
        self.data = nn.Parameter(torch.ones(2))  # also the name of an objective's only term
        self.bias = nn.Parameter(torch.ones(2))


HELD = {
    "data",
    "linear.weight",
    "conv.weight",
    "embedding.weight",
    "bilinear.weight",
    "prelu.weight",
    *(f"lstm.weight_{part}_l0{way}" for part in ("ih", "hh") for way in ("", "_reverse")),
    "attention.in_proj_weight",
    "attention.out_proj.weight",
}


def random_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = Everything().to(dtype)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


# --------------------------------------------------------------------------- what they hold


def test_the_default_rule_spares_biases_and_norm_parameters_and_holds_all_else():
    model = Everything()
    assert set(select_parameters(L2(0.1), model)) == HELD
    spared = {name for name, _ in model.named_parameters()} - HELD
    assert {"bias", "linear.bias", "lstm.bias_hh_l0_reverse", "attention.in_proj_bias"} < spared
    assert {"attention.bias_k", "norms.0.weight", "norms.4.gain"} < spared


def test_held_parameters_are_those_of_the_model_itself():
    model = Everything()
    selected = select_parameters(L2(0.1), model)
    assert len(selected) > 3
    assert all(p is model.get_parameter(name) for name, p in selected.items())


@pytest.mark.parametrize(
    ("on", "contents"),
    [
        ("0.weight", ["0.weight"]),
        ("*.bias", ["0.bias", "2.bias"]),
        (["2.*", "0.bias"], ["0.bias", "2.weight", "2.bias"]),
        (("*", "0.*"), ["0.weight", "0.bias", "2.weight", "2.bias"]),  # none twice
        ("[02].weight", ["0.weight", "2.weight"]),
    ],
)
def test_patterns_choose_by_name_biases_included(on, contents):
    assert list(select_parameters(L2(1.0, on=on), small())) == contents


def test_frozen_parameters_are_not_held():
    model = small()
    model[0].weight.requires_grad_(False)
    assert list(select_parameters(L2(1.0), model)) == ["2.weight"]
    with pytest.raises(ModelError, match=r"'0\.weight', which matches no .*are: 0\.bias, 2\.weig"):
        select_parameters(L2(1.0, on="0.weight"), model)


@pytest.mark.parametrize("on", [None, "*", "head.weight", "body.weight", ("body.*", "head.*")])
def test_tied_weights_are_held_once_by_any_of_their_names(on):
    model = nn.ModuleDict({"body": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["body"].weight
    with torch.no_grad():
        model["body"].weight.fill_(1.0)
    assert list(select_parameters(L2(1.0, on=on), model)) == ["body.weight"]
    (value,) = compute_values(L2(1.0, on=on), model).values()
    assert value == 6 / 2
    gradients = {"body.weight": torch.zeros(3, 2)}
    add_gradients(L2(0.5, on=on), model, gradients)
    assert torch.equal(gradients["body.weight"], torch.full((3, 2), 0.5))


def test_a_penalty_that_finds_nothing_by_default_is_zero_and_adds_nothing():
    model = nn.LayerNorm(3)
    gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert add_gradients(L2(1.0), model, gradients) == {"L2": torch.zeros(())}
    assert all(torch.equal(g, torch.ones(3)) for g in gradients.values())


# --------------------------------------------------------------------- value and gradient


FORMULAS = {
    "L2": (L2, lambda a, w: a / 2 * (w**2).sum()),
    "L1": (L1, lambda a, w: a * w.abs().sum()),
}


def by_autograd(kind, strength, model):
    """Omega over the parameters in HELD, and its gradient for every parameter."""
    formula = FORMULAS[kind][1]
    model = copy.deepcopy(model)
    omega = sum(formula(strength, p) for name, p in model.named_parameters() if name in HELD)
    omega.backward()
    return omega.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


@seeded
@given(
    kind=st.sampled_from(["L1", "L2"]),
    strength=st.sampled_from([0.0, 1e-4, 0.5, 3.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_value_and_gradient_are_those_of_autograd(kind, strength, seed, dtype):
    model = random_model(seed, dtype)
    penalty = FORMULAS[kind][0](strength)
    data = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    gradients = {name: g.clone() for name, g in data.items()}
    parts = add_gradients(penalty, model, gradients)
    value, expected = by_autograd(kind, strength, model)
    # Tolerance: sums of 150 terms and one product, rounded once each.
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(parts, {kind: value}, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        compute_values(penalty, model), {kind: value}, rtol=tolerance, atol=0
    )
    for name, gradient in gradients.items():
        added = data[name] + expected[name]
        torch.testing.assert_close(gradient, added, rtol=tolerance, atol=tolerance)


def test_the_comparison_tells_half_the_square_from_the_square():
    model = random_model()
    value, _ = by_autograd("L2", 0.1, model)
    whole = sum(
        (0.1 * p.detach() ** 2).sum() for name, p in model.named_parameters() if name in HELD
    )
    assert not math.isclose(value, whole, rel_tol=0.1)


def test_l1_has_no_gradient_at_zero():
    gradients = {"weight": torch.zeros(1, 3)}
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-2.0, 0.0, 5.0]]))
    assert add_gradients(L1(0.5), model, gradients)["L1"] == 3.5
    assert gradients["weight"].tolist() == [[-0.5, 0, 0.5]]


def test_l2_is_the_weight_decay_of_torch():
    model = random_model()
    contents = select_parameters(L2(0.3), model)
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    add_gradients(L2(0.3), model, gradients)
    expected = {name: p.detach() - 0.1 * gradients[name] for name, p in contents.items()}
    for p in contents.values():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(contents.values(), lr=0.1, weight_decay=0.3).step()
    # Tolerance: the order of two products.
    torch.testing.assert_close(
        {n: p.detach() for n, p in contents.items()}, expected, rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_squared_and_summed_in_float32(dtype):
    model = nn.Linear(100, 100, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(300.0)  # its square is beyond float16
    gradients = {"weight": torch.zeros(100, 100)}
    value = add_gradients(L2(2.0), model, gradients)["L2"]
    weight = model.weight[0, 0].item()  # as the dtype has it
    assert value.dtype == torch.float32
    assert math.isclose(value, 1e4 * weight**2, rel_tol=1e-6)  # a float32 sum of 1e4 terms
    assert gradients["weight"].dtype == torch.float32
    assert (gradients["weight"] == 2 * weight).all()


def test_no_penalty_has_no_parts():
    assert add_gradients(None, small(), {}) == compute_values(None, small()) == {}


# ------------------------------------------------------------------------------ sums, names


def test_penalties_add_up_and_each_is_a_part_by_name():
    model = random_model()
    both = L2(0.1) + L1(0.2, on="linear.*") + L2(0.3, on=["bias", "data"], name="offsets")
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parts = add_gradients(both, model, gradients)
    assert list(parts) == ["L2", "L1(linear.*)", "offsets"]
    alone = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for term in both:
        assert torch.equal(add_gradients(term, model, alone)[term.part], parts[term.part])
    assert all(torch.equal(alone[name], g) for name, g in gradients.items())


def test_a_sum_may_be_made_of_sums():
    left, right = L1(1.0) + L2(1.0), L2(2.0, name="a") + L2(2.0, name="b")
    assert [term.part for term in left + right] == ["L1", "L2", "a", "b"]
    assert [term.part for term in L2(1.0, name="c") + right] == ["c", "a", "b"]
    assert left == Penalties((L1(1.0), L2(1.0)))


def test_patterns_name_the_part_and_a_list_equals_a_tuple():
    assert L2(0.1, on="*.weight").part == "L2(*.weight)"
    assert L1(0.1, on=["a", "b"]).part == "L1(a, b)"
    assert L2(0.1, on=["a"]) == L2(0.1, on=("a",)) == L2(0.1, on="a")


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2(-0.1), "L2 has strength -0.1. It must be finite and at least 0"),
        (lambda: L1(math.nan), "L1 has strength nan. It must be finite and at least 0"),
        (lambda: L1(math.inf), "L1 has strength inf. It must be finite and at least 0"),
        (
            lambda: L2(0.1, on=[]),
            r"on is \[\]. It must be a pattern of parameter names, or several",
        ),
        (
            lambda: L2(0.1, on=[3]),
            r"on is \[3\]. It must be a pattern of parameter names, or several",
        ),
        (lambda: L2(0.1) + L2(0.2), "Two penalties are both called 'L2'.*add their strengths"),
        (lambda: L2(0.1) + L1(0.2, name="L2"), "Two penalties are both called 'L2'"),
    ],
)
def test_penalties_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def test_a_pattern_without_a_match_is_refused_with_the_names_that_there_are():
    message = (
        r"L2\(0\.weigth\) is on '0\.weigth'.*There are: 0\.weight, 0\.bias, 2\.weight, 2\.bias\."
    )
    with pytest.raises(ModelError, match=message):
        compute_values(L2(0.1, on="0.weigth"), small())
    with pytest.raises(ModelError, match=r"is on '5\.\*', which matches no"):
        select_parameters(L2(0.1, on=["0.*", "5.*"]), small())
