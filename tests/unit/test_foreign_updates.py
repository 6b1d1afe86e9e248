"""Losses and models of others that write, differentiate, hook or scale by themselves.

Oracle: the same code in plain PyTorch, once over the whole batch, in float64. Tolerance: 1e-10,
relative, for sums in another order through a few layers. Each kind has a control: the classic
mistake is off by far more.
"""

import functools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anybatch as ab
from anybatch.errors import LedgerError, ModelError
from foreign import LAYOUTS, X, Y, by_library, distance, entropy, flat, network, plainly

REDUCTIONS = {
    "mean": (ab.Mean(), torch.mean),
    "max": (ab.Max(), torch.max),
    "top": (ab.TopFraction(0.25), lambda v: v.topk(3)[0].mean()),
}
OBSERVED = [None, ab.Observe(norms=True)]


@dataclass
class Pair:
    x: Tensor
    y: Tensor


def scales_its_input(model, batch):
    batch[0].mul_(0.5)
    return entropy(model, batch)


def shifts_its_labels(model, batch):
    batch[1].sub_(1).clamp_(0)
    return entropy(model, batch)


def pops_its_labels(model, batch):
    return entropy(model, (batch["x"], batch.pop("y")))


def writes_into_a_nested_leaf(model, batch):
    batch["in"]["x"].add_(1)
    return entropy(model, (batch["in"]["x"], batch["y"]))


def writes_into_an_array(model, batch):
    batch[2][...] = 2 * batch[2] + 1
    return entropy(model, (batch[0] + torch.as_tensor(batch[2])[:, None], batch[1]))


def writes_into_a_dataclass(model, batch):
    batch.x.mul_(2)
    batch.y = (batch.y + 1) % 3
    return entropy(model, (batch.x, batch.y))


WRITES = {
    scales_its_input: lambda: (X.clone(), Y.clone()),
    shifts_its_labels: lambda: (X.clone(), Y.clone()),
    pops_its_labels: lambda: {"x": X.clone(), "y": Y.clone()},
    writes_into_a_nested_leaf: lambda: {"in": {"x": X.clone()}, "y": Y.clone()},
    writes_into_an_array: lambda: (X.clone(), Y.clone(), np.arange(12.0) / 10),
    writes_into_a_dataclass: lambda: Pair(X.clone(), Y.clone()),
}


@pytest.mark.fast(1)
@pytest.mark.parametrize("observe", OBSERVED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("losses", WRITES)
def test_writes_into_the_batch_are_made_once(losses, reduction, observe):
    make_batch, (reduction, reduce) = WRITES[losses], REDUCTIONS[reduction]
    right = plainly(losses, make_batch(), reduce)
    for size in LAYOUTS:
        layout = ab.Layout(size)
        result = by_library(losses, make_batch(), reduction, layout=layout, observe=observe)
        assert distance(result, right) < 1e-10, size


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), np.random.rand, random.random])
@pytest.mark.parametrize("losses", WRITES)
def test_a_draw_that_is_found_late_does_not_write_twice(losses, draw):
    def drawing(model, batch):
        return losses(model, batch) + 0 * float(draw())

    right = plainly(losses, WRITES[losses]())
    for size in (None, 6, 3):
        batch, layout = WRITES[losses](), ab.Layout(size)
        model, objective = network(), ab.Objective(drawing, grain=3)
        ab.batch_gradient(model, objective, batch, key=ab.Key(0, 0), layout=layout)
        assert distance(flat(model), right) < 1e-10, size


def test_the_oracle_of_writes_tells_one_from_two():
    batch = (X.clone(), Y.clone())
    once = plainly(scales_its_input, batch)
    assert distance(plainly(scales_its_input, batch), once) > 0.01


def attack(model, batch):
    x = batch[0].clone().requires_grad_()
    entropy(model, (x, batch[1])).sum().backward()
    return entropy(model, (batch[0] + 0.1 * x.grad.sign(), batch[1]))


def attack_thrice(model, batch):
    x = batch[0]
    for _ in range(3):
        x = x.detach().clone().requires_grad_()
        entropy(model, (x, batch[1])).sum().backward()
        x = x + 0.05 * x.grad.sign()
    return entropy(model, (x.detach(), batch[1]))


def attack_between_zero_grad(model, batch):
    x = batch[0].clone().requires_grad_()
    model.zero_grad()
    entropy(model, (x, batch[1])).sum().backward()
    model.zero_grad()
    return entropy(model, (batch[0] + 0.1 * x.grad.sign(), batch[1]))


def virtual_attack(model, batch):
    step = torch.full_like(batch[0], 0.1).requires_grad_()
    soft = model(batch[0]).softmax(1).detach()
    (-(soft * model(batch[0] + step).log_softmax(1)).sum()).backward()
    away = step.grad / step.grad.norm(dim=1, keepdim=True)
    return entropy(model, batch) - (soft * model(batch[0] + away).log_softmax(1)).sum(1)


def leaves_something_in_grad(model, batch):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return entropy(model, batch)


@pytest.mark.fast(1)
@pytest.mark.parametrize("observe", OBSERVED)
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize(
    "losses",
    [attack, attack_thrice, attack_between_zero_grad, virtual_attack, leaves_something_in_grad],
)
def test_losses_may_go_back_by_themselves(losses, reduction, observe):
    reduction, reduce = REDUCTIONS[reduction]
    right = plainly(losses, (X, Y), reduce)
    for size in LAYOUTS:
        result = by_library(losses, (X, Y), reduction, layout=ab.Layout(size), observe=observe)
        assert distance(result, right) < 1e-10, size


def test_the_oracle_of_attacks_tells_what_they_leave_in_grad():
    model = network()
    attack(model, (X, Y)).mean().backward()  # without zero_grad in between
    assert distance(flat(model), plainly(attack, (X, Y))) > 1


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # torch's own advice
def test_a_gradient_penalty_by_backward_is_that_by_grad():
    def penalty(model, batch, *, by_backward):
        x = batch[0].clone().requires_grad_()
        total = model(x).sum()
        if by_backward:
            total.backward(create_graph=True)
            return entropy(model, batch) + x.grad.square().sum(1)
        (g,) = torch.autograd.grad(total, x, create_graph=True)
        return entropy(model, batch) + g.square().sum(1)

    right = plainly(functools.partial(penalty, by_backward=False), (X, Y))
    losses = functools.partial(penalty, by_backward=True)
    for size in LAYOUTS:
        assert distance(by_library(losses, (X, Y), layout=ab.Layout(size)), right) < 1e-10


def add_hook(register):
    def make():
        model = network()
        for p in model.parameters():
            register(p)
        return model

    return make


def normalise(p):
    p.grad.div_(p.grad.norm())


HOOKS = {
    "clamp": lambda p: p.register_hook(lambda g: g.clamp(-0.01, 0.01)),
    "normalise": lambda p: p.register_hook(lambda g: g / g.norm()),
    "threshold": lambda p: p.register_hook(lambda g: torch.where(g.abs() < 0.01, 0 * g, g)),
    "two": lambda p: [p.register_hook(torch.sign), p.register_hook(lambda g: g * g.norm())],
    "afterwards": lambda p: p.register_post_accumulate_grad_hook(normalise),
}


@pytest.mark.fast(1)
@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("observe", OBSERVED)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_parameters_see_the_whole_gradient_once(hook, observe, bitwise):
    make = add_hook(HOOKS[hook])
    for reduction, reduce in (REDUCTIONS["mean"], REDUCTIONS["max"]):
        right = plainly(entropy, (X, Y), reduce, make)
        for size in [None] if bitwise else LAYOUTS:
            how = {"layout": ab.Layout(size), "observe": observe, "bitwise": bitwise}
            assert distance(by_library(entropy, (X, Y), reduction, make=make, **how), right) < 1e-10


def test_the_oracle_of_hooks_tells_the_sum_of_clamped_parts():
    make = add_hook(HOOKS["clamp"])
    parts = [plainly(entropy, (X[a : a + 6], Y[a : a + 6]), make=make) for a in (0, 6)]
    assert distance(sum(parts) / 2, plainly(entropy, (X, Y), make=make)) > 0.1


def step_alone(optimizer, p):
    optimizer.step()


@pytest.mark.parametrize("size", LAYOUTS)
def test_an_optimiser_in_the_backward_pass_steps_once(size):
    def make():
        model = network()
        for p in model.parameters():
            optimizer = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(functools.partial(step_alone, optimizer))
        return model

    right, model = make(), make()
    entropy(right, (X, Y)).mean().backward()
    ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))
    for p, q in zip(model.parameters(), right.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12  # weights of about 1


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.01, 0.01)


def threshold(gradient):
    return torch.where(gradient.abs() < 0.005, 0 * gradient, gradient)


def clip_rows(gradient):
    return gradient * (0.02 / gradient.norm(dim=1, keepdim=True)).clamp(max=1)


def with_hook(hook):
    def losses(model, batch):
        h = model[0](batch[0])
        h.register_hook(hook)
        return F.cross_entropy(model[2](model[1](h)), batch[1], reduction="none")

    return losses


def with_function(model, batch):
    h = Clamp.apply(model[0](batch[0]))
    return F.cross_entropy(model[2](model[1](h)), batch[1], reduction="none")


BENT = [with_hook(threshold), with_hook(clip_rows), with_function]


@pytest.mark.fast(1)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("losses", BENT)
def test_hooks_on_activations_see_the_gradients_of_the_uncut_batch(losses, reduction):
    reduction, reduce = REDUCTIONS[reduction]
    right = plainly(losses, (X, Y), reduce)
    for size in LAYOUTS:
        result = by_library(losses, (X, Y), reduction, layout=ab.Layout(size))
        assert distance(result, right) < 1e-10, size


@pytest.mark.parametrize("losses", BENT)
def test_the_oracle_of_hooks_on_activations_tells_another_size(losses):
    def double_gradient(model, batch):
        return 2 * losses(model, batch)

    assert distance(plainly(double_gradient, (X, Y)) / 2, plainly(losses, (X, Y))) > 0.01


@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize("losses", BENT)
def test_observed_they_do_so_too_or_are_refused_where_weights_differ(losses, size):
    how = {"observe": ab.Observe(norms=True), "layout": ab.Layout(size)}
    for reduction, reduce in (REDUCTIONS["mean"], REDUCTIONS["max"]):
        right = plainly(losses, (X, Y), reduce)
        assert distance(by_library(losses, (X, Y), reduction, **how), right) < 1e-10
    with pytest.raises(LedgerError, match="changes gradients by their size"):
        by_library(losses, (X, Y), ab.Tilted(1.0), **how)
    with pytest.raises(LedgerError, match="changes gradients by their size"):
        by_library(losses, (X, Y), clip=ab.ClipExamples(1e9), layout=ab.Layout(size))


@pytest.mark.parametrize("losses", BENT)
def test_with_counts_they_are_exact_uncut_and_refused_cut(losses):
    counts = torch.tensor([1.0, 2, 3], dtype=torch.float64)

    def count_calls(model, batch):
        n = counts[batch[1]]
        return ab.ExampleLosses(losses(model, batch) * n, n)

    right = plainly(lambda m, b: losses(m, b) * counts[Y] / counts[Y].sum(), (X, Y), torch.sum)
    assert distance(by_library(count_calls, (X, Y)), right) < 1e-10
    with pytest.raises(ModelError, match="the backward pass differs"):
        by_library(count_calls, (X, Y), layout=ab.Layout(6))
