"""`assert_layout_invariant` on plain PyTorch loops: right ones pass, classic mistakes are named.

Every loop here is the same but for its divisor, so that the expected factor is arithmetic:
the right divisor over the wrong one.
"""

import copy
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anybatch.audit import assert_layout_invariant
from anybatch.errors import AnybatchError
from anybatch.pytree import Shared
from properties import seeded_examples


def classifier(dtype=torch.float32, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3)]
    return nn.Sequential(*layers).to(dtype)


def examples(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (count,), generator=generator)


def count_of(*parts):
    return sum(len(targets) for _, targets in parts)


# divisor(part, parts): what the summed loss of one micro-batch is divided by.
DIVISORS = {
    "right": lambda part, parts: count_of(*parts),
    "sum": lambda part, parts: 1,
    "not divided": lambda part, parts: count_of(part),
    "mean of means": lambda part, parts: count_of(part) * len(parts),
    "constant window of 4": lambda part, parts: count_of(part) * 4,
    "divided twice": lambda part, parts: count_of(*parts) * len(parts),
    "short end taken for full": lambda part, parts: count_of(parts[0]) * len(parts),
}


def loop(model, divisor="right"):
    def step(parts):
        model.zero_grad()
        for part in parts:
            inputs, targets = part
            summed = F.cross_entropy(model(inputs), targets, reduction="sum")
            (summed / DIVISORS[divisor](part, parts)).backward()
        return model

    return step


@seeded_examples(25)
@given(
    count=st.integers(2, 13),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    divisor=st.sampled_from(["right", "sum"]),
)
def test_a_right_loop_passes_at_any_batch_size_and_dtype(count, seed, dtype, divisor):
    step = loop(classifier(dtype, seed), divisor)
    assert_layout_invariant(step, examples(count, dtype, seed))


@seeded_examples(25)
@given(
    count=st.integers(2, 13),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_loop_that_forgets_to_divide_fails_at_any_batch_size_and_dtype(count, seed, dtype):
    step = loop(classifier(dtype, seed), "not divided")
    with pytest.raises(AssertionError, match="not divided by the number of micro-batches"):
        assert_layout_invariant(step, examples(count, dtype, seed))


@pytest.mark.parametrize(
    ("divisor", "micro_batch", "results"),
    [
        ("not divided", 2, r"2\+2\+2\+2: 4\.000 times .*not divided by the number"),
        ("not divided", 4, r"4\+4: 2\.000 times .*not divided by the number"),
        ("not divided", 3, r"3\+3\+2: 2\.9.. times .* beyond a factor.*not divided by the number"),
        ("constant window of 4", 2, r"2\+2\+2\+2: 4\.000 times .*or is divided by a constant"),
        ("divided twice", 2, r"2\+2\+2\+2: 0\.250 times .*divided twice"),
        ("short end taken for full", 3, r"3\+3\+2: 0\.889 times .*as a full one"),  # 8 / 9
        ("mean of means", 6, r"6\+2: .* beyond a factor.*a mean of means"),
    ],
)
def test_a_wrong_divisor_is_told_with_its_factor_and_cause(divisor, micro_batch, results):
    model, batch = classifier(torch.float64), examples(8, torch.float64)
    with pytest.raises(AssertionError, match="(?s)" + results):
        assert_layout_invariant(loop(model, divisor), batch, micro_batches=[micro_batch])
    assert_layout_invariant(loop(model), batch, micro_batches=[micro_batch])


@pytest.mark.parametrize("divisor", ["mean of means", "short end taken for full"])
def test_what_only_ragged_ends_reveal_is_listed_for_ragged_layouts_alone(divisor):
    step, batch = loop(classifier(), divisor), examples(8)
    with pytest.raises(AssertionError, match="gradient depends on the layout") as failure:
        assert_layout_invariant(step, batch)
    assert re.findall(r"^  ([\d+]+):", str(failure.value), re.MULTILINE) == ["3+3+2", "6+2"]
    assert_layout_invariant(step, batch, micro_batches=[1, 2, 4])


def test_factor_and_remainder_are_those_of_linear_regression_by_hand():
    # Oracle: NumPy, gradients 2 (x.w - y) x written out. Tolerance: the three digits printed.
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
    each = 2 * (x @ weight - y)[:, None] * x
    whole = each.mean(0)
    means = (each[:6].mean(0) + each[6:].mean(0)) / 2
    scale = max(np.linalg.norm(whole), np.sqrt((each**2).sum(1).mean()))
    factor = means @ whole / (whole @ whole)
    off = np.linalg.norm(means - whole) / scale
    beyond = np.linalg.norm(means - factor * whole) / scale
    parameter = torch.tensor(weight, requires_grad=True)

    def mean_of_means(parts):
        parameter.grad = None
        for inputs, targets in parts:
            (F.mse_loss(inputs @ parameter, targets) / len(parts)).backward()
        return [parameter]

    results = (
        f"6+2: {factor:.3f} times (off by {off:.3g} of the scale, and {beyond:.3g} of the scale"
    )
    with pytest.raises(AssertionError, match=re.escape(results)):
        assert_layout_invariant(
            mean_of_means, (torch.tensor(x), torch.tensor(y)), micro_batches=[6]
        )


def regression_at_its_optimum():
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 4), torch.randn(32)
    parameter = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0].requires_grad_()

    def step(parts, weigh=False):
        parameter.grad = None
        for x, y in parts:
            count = len(y) * len(parts) if weigh else count_of(*parts)
            (F.mse_loss(x @ parameter, y, reduction="sum") / count).backward()
        return [parameter]

    return step, (inputs, targets)


def test_a_right_loop_passes_where_the_gradients_of_the_examples_cancel():
    step, batch = regression_at_its_optimum()
    assert_layout_invariant(step, batch)


def test_cancelling_gradients_would_fail_a_difference_relative_to_the_batch_gradient():
    step, (inputs, targets) = regression_at_its_optimum()
    whole = step([(inputs, targets)])[0].grad
    cut = step(list(zip(inputs.split(8), targets.split(8), strict=True)))[0].grad
    assert (cut - whole).norm() > 1e-2 * whole.norm()  # the float32 tolerance is 1e-5


def test_cancelling_gradients_do_not_hide_a_mean_of_means():
    step, batch = regression_at_its_optimum()
    with pytest.raises(AssertionError, match=r"(?s)batch's gradient is 0.*a mean of means"):
        assert_layout_invariant(lambda parts: step(parts, weigh=True), batch)


def token_loop(model, by_batch):
    """Examples of 4 tokens, -100 masked; divided by all tokens, or a mean of token means."""

    def step(parts):
        model.zero_grad()
        tokens = sum((part["labels"] != -100).sum() for part in parts)
        for part in parts:
            counted = part["labels"].flatten() != -100
            logits = model(part["inputs"]).flatten(0, 1)
            losses = F.cross_entropy(logits, part["labels"].flatten(), reduction="none")
            divisor = tokens if by_batch else counted.sum() * len(parts)
            ((losses * counted).sum() / divisor).backward()
        return model.parameters()

    return step


def tokens_of(lengths):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (len(lengths), 4), generator=generator)
    labels[torch.arange(4) >= torch.tensor(lengths)[:, None]] = -100
    return {"inputs": torch.randn(len(lengths), 4, 5, generator=generator), "labels": labels}


@pytest.mark.parametrize("lengths", [(4, 1, 2, 3, 3, 1), (4, 0, 2, 3, 3, 1)])
def test_a_mean_over_all_tokens_passes_with_a_wholly_masked_example_too(lengths):
    assert_layout_invariant(token_loop(classifier(), by_batch=True), tokens_of(lengths))


def test_a_mean_of_token_means_fails_though_the_micro_batches_are_equal():
    step = token_loop(classifier(), by_batch=False)
    with pytest.raises(AssertionError, match=r"unequal counts \(tokens\) weigh the same"):
        assert_layout_invariant(step, tokens_of((4, 4, 2, 1, 3, 1)), micro_batches=[3])
    assert_layout_invariant(step, tokens_of((2, 2, 2, 2, 2, 2)), micro_batches=[3])


def test_a_micro_batch_without_a_counted_term_is_told_as_not_finite():
    weight = torch.ones(1, requires_grad=True)

    def step(parts, by_batch=False):
        weight.grad = None
        counts = [counted.sum() for _, counted in parts]
        for (inputs, counted), weights in zip(parts, counts, strict=True):
            summed = ((weight * inputs) ** 2 * counted).sum()
            (summed / (sum(counts) if by_batch else weights * len(parts))).backward()
        return [weight]

    batch = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    # The scale is sqrt((2^2 + 18^2) / 2): the second example has no gradient of its own.
    with pytest.raises(AssertionError, match=r"(?s)scale 12\.8\..*1\+1\+1: not finite \(0 / 0"):
        assert_layout_invariant(step, batch, micro_batches=[1])
    assert_layout_invariant(lambda parts: step(parts, by_batch=True), batch, micro_batches=[1])


def test_gradients_lost_between_micro_batches_have_no_factor():
    model = classifier()

    def last_only(parts):
        for part in parts:
            loop(model)([part])  # zeroes the gradients each time
        return model

    with pytest.raises(AssertionError, match="gradients are lost between micro-batches"):
        assert_layout_invariant(last_only, examples(8))


def test_a_batch_gradient_of_zero_is_told_without_a_factor():
    weight = torch.zeros(1, requires_grad=True)

    def mean_of_means(parts):
        weight.grad = None
        for (slopes,) in parts:
            (weight * slopes).mean().div(len(parts)).backward()
        return [weight]

    slopes = torch.tensor([1.0, 1.0, -2.0])
    with pytest.raises(AssertionError, match=r"2\+1: 0\.354 of the scale, while .* is 0"):
        assert_layout_invariant(mean_of_means, (slopes,))  # (1 - 2)/2 over sqrt(6/3)


@pytest.mark.parametrize("divisor", ["right", "sum"])
def test_the_tolerance_given_is_applied_relative_to_the_batch_gradient(divisor):
    model = classifier(torch.float64)
    batch = [leaf.repeat_interleave(8, 0) for leaf in examples(1, torch.float64)]  # none cancel

    def bias_step(parts):  # a relative error of 1e-6 where there are several micro-batches
        loop(model, divisor)(parts)
        for p in model.parameters():
            p.grad *= 1 + 1e-6 * (len(parts) > 1)
        return model

    assert_layout_invariant(bias_step, batch, tolerance=1.1e-6)
    with pytest.raises(AssertionError, match="within 9e-07 of the scale"):
        assert_layout_invariant(bias_step, batch, tolerance=0.9e-6)
    with pytest.raises(AssertionError, match="within 1e-12 of the scale"):
        assert_layout_invariant(bias_step, batch)


def test_shared_leaves_reach_the_step_whole_and_unwrapped():
    model, sizes = classifier(), []

    def step(parts):
        sizes.extend(table.shape for *_, table in parts)
        return loop(model)([part[:2] for part in parts])

    assert_layout_invariant(step, (*examples(4), Shared(torch.ones(9))))
    assert set(sizes) == {torch.Size([9])}


@dataclass
class Mistaken:
    """A right loop with one mistake around it."""

    model: nn.Module
    mistake: str

    def __call__(self, parts):
        old = [p.grad for p in self.model.parameters()]
        loop(self.model)(parts)
        for p, before in zip(self.model.parameters(), old, strict=True):
            if self.mistake == "keeps gradients" and before is not None:
                p.grad += before
            if self.mistake == "steps":
                p.data -= 0.1 * p.grad
            if self.mistake == "zeroes at the end":
                p.grad = None
            if self.mistake == "overflows":
                p.grad /= 0
        return {"returns nothing": None, "returns a loss": torch.tensor(1.0)}.get(
            self.mistake, self.model
        )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("keeps gradients", r"adds to the gradients .*model\.zero_grad\(\)"),
        ("steps", r"changed the weights.*Stop before optimizer\.step\(\)"),
        ("zeroes at the end", r"left no gradient: every p\.grad is None or 0"),
        ("overflows", "The gradient of the whole batch is not finite"),
        ("returns nothing", "returned NoneType without parameters.*'return model'"),
        ("returns a loss", "returned Tensor without parameters.*'return model'"),
    ],
)
def test_a_mistake_in_the_step_is_an_error_that_says_how_to_mend_it(mistake, message):
    with pytest.raises(AnybatchError, match=message):
        assert_layout_invariant(Mistaken(classifier(), mistake), examples(8))
    assert_layout_invariant(Mistaken(classifier(), "none"), examples(8))


def test_gradients_left_by_earlier_training_do_no_harm():
    model = classifier()
    model(examples(3)[0]).sum().backward()
    assert_layout_invariant(loop(model), examples(8))


def test_frozen_parameters_alone_are_refused():
    model = classifier().requires_grad_(False)
    with pytest.raises(AnybatchError, match="returned Sequential without parameters"):
        assert_layout_invariant(lambda parts: model, examples(8))


def test_dropout_is_refused_as_not_repeatable_and_passes_in_eval_mode():
    model = classifier(dropout=0.5)
    with pytest.raises(AnybatchError, match="put the model in eval mode, or set dropout to 0"):
        assert_layout_invariant(loop(model), examples(8))
    assert_layout_invariant(loop(model.eval()), examples(8))


def test_batch_normalisation_fails_with_a_note_on_one_example_and_passes_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="With batch normalisation every layout differs"):
        assert_layout_invariant(loop(model), examples(8))
    assert_layout_invariant(loop(model.eval()), examples(8))


@pytest.mark.parametrize(
    ("count", "micro_batches", "message"),
    [
        (1, None, "A batch of 1 examples has one layout. Pass 2 or more"),
        (8, [], r"micro_batches is \[\].* sizes must be from 1 to 7"),
        (8, [2, 8], r"micro_batches is \[2, 8\].* sizes must be from 1 to 7"),
        (8, [0], r"micro_batches is \[0\].* sizes must be from 1 to 7"),
    ],
)
def test_a_batch_that_has_no_second_layout_is_refused(count, micro_batches, message):
    with pytest.raises(AnybatchError, match=message):
        assert_layout_invariant(loop(classifier()), examples(count), micro_batches=micro_batches)


def test_the_check_leaves_weights_as_they_were_and_gradients_cleared():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    assert_layout_invariant(loop(model), examples(8))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
