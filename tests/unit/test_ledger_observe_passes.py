"""`ab.observe` over several backward passes, and whatever else touches `.grad`.

Oracles: `observed_loops.one_at_a_time`, plain autograd of each example alone, within its bound; for
hooks and for `.grad`, the same loop without `ab.observe`. The control of a norm of two passes is
that of the first alone.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from observed_loops import BOUND, assert_exact, distance, normal, one_at_a_time, whole_gradient

B = 6
X = normal(B, 4)
Y = torch.arange(B) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_accumulation_holds_all_examples_in_order():
    model = network()
    truth = one_at_a_time(model, F.cross_entropy(model(X), Y, reduction="none") / B)
    with ab.observe(model) as ledger:
        for rows in (slice(0, 3), slice(3, 4), slice(4, 6)):
            (F.cross_entropy(model(X[rows]), Y[rows], reduction="sum") / B).backward()
    assert_exact(ledger, model, truth)


@pytest.mark.parametrize("is_cleared", [True, False])
def test_the_ledger_starts_anew_after_a_step_or_once_gradients_are_cleared(is_cleared):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = []
    with ab.observe(model) as ledger:
        for _ in range(12):  # beyond the 10th, at which plans are looked for again
            for rows in (slice(0, 4), slice(4, 6)):
                model(X[rows]).square().sum().backward()
                sizes.append(len(ledger.norms))
            if is_cleared:
                optimizer.zero_grad(set_to_none=False)
            else:
                optimizer.step()
    assert sizes == [4, 6] * 12


def test_passes_without_a_step_in_between_belong_together_over_many_rounds():
    model = network()
    truth = one_at_a_time(model, model(X).square().sum(1))
    with ab.observe(model) as ledger:
        for _ in range(12):
            model(X).square().sum().backward()
    assert_exact(ledger, model, truth.repeat(12, 1))


def test_two_backward_passes_through_one_forward_pass_add_up_by_example():
    model = network()
    y = model(X)
    truth = one_at_a_time(model, y[:, 0].square() + y[:, 1].cos())
    first = one_at_a_time(model, y[:, 0].square())
    with ab.observe(model) as ledger:
        y = model(X)
        y[:, 0].square().sum().backward(retain_graph=True)
        y[:, 1].cos().sum().backward()
    assert_exact(ledger, model, truth)
    assert distance(first.norm(dim=1), truth.norm(dim=1)) > 0.1  # the control


def test_two_losses_with_heads_of_their_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(4, 5), "a": nn.Linear(5, 1), "b": nn.Linear(5, 1)})
    model.double()
    state = model["body"](X).tanh()
    truth = one_at_a_time(model, (model["a"](state).square() + model["b"](state).cos())[:, 0])
    with ab.observe(model) as ledger:
        state = model["body"](X).tanh()
        model["a"](state).square().sum().backward(retain_graph=True)
        model["b"](state).cos().sum().backward()
    assert_exact(ledger, model, truth)


def test_a_second_pass_that_cannot_be_added_is_refused():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(normal(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b

    model = Shift()
    with ab.observe(model):
        y = model(X)
        y.sum().backward()
        with pytest.raises(LedgerError, match="Pass retain_graph=True to the first"):
            y.sum().backward()  # plain PyTorch allows it: a sum keeps nothing


def leaves_as_plain(loop: Callable[[nn.Module], object]) -> bool:
    """Return whether `.grad` and the loop's result are the same observed and unobserved."""
    results = []
    for context in (nullcontext, ab.observe):
        model = network()
        with context(model) if context is ab.observe else context():
            returned = loop(model)
        results.append((whole_gradient(model), returned))
    (plain, expected), (observed, returned) = results
    return distance(observed, plain) < BOUND and returned == expected


def test_hooks_of_parameters_run_once_on_the_whole_gradient():
    def loop(model: nn.Module) -> list[float]:
        calls: list[float] = []
        model[0].weight.register_hook(lambda g: g.clamp(-0.5, 0.5))
        model[0].bias.register_hook(lambda g: g * g.abs().max())
        model[2].weight.register_post_accumulate_grad_hook(
            lambda p: calls.append(round(float(p.grad.norm()), 9))
        )
        for _ in range(3):
            model(X).square().sum().backward()
        return calls

    assert leaves_as_plain(loop)


def test_an_optimiser_that_steps_in_the_backward_pass():
    def loop(model: nn.Module) -> list[float]:
        def step(p: nn.Parameter) -> None:
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            model(X).square().mean().backward()
        final = [round(float(p.detach().norm()), 9) for p in model.parameters()]
        model(X).square().mean().backward()
        for p in model.parameters():
            p.grad = p.detach().clone()
        return final

    assert leaves_as_plain(loop)


def test_other_leaves_get_the_gradients_that_they_get_unobserved():
    def loop(model: nn.Module) -> list[float]:
        torch.manual_seed(1)
        other, x = nn.Linear(4, 4).double(), X.clone().requires_grad_()
        for order in (torch.arange(B), torch.arange(B)[torch.arange(B)]):
            model(other(x)[order]).square().sum().backward()  # indexing is confirmed
        return [round(float(t.grad.norm()), 8) for t in (other.weight, x)]

    assert leaves_as_plain(loop)


@pytest.mark.parametrize("way", ["vector", "several", "weights"])
def test_ways_to_go_back(way):
    model, c = network(), normal(B, 3, seed=1)
    truth = one_at_a_time(model, (model(X) * c).sum(1))
    with ab.observe(model) as ledger:
        y = model(X)
        if way == "vector":
            y.backward(c)
        elif way == "several":
            torch.autograd.backward([(y[:, k] * c[:, k]).sum() for k in range(3)])
        else:
            torch.autograd.backward([y[:, k] for k in range(3)], list(c.T))
    assert_exact(ledger, model, truth)


def test_adversarial_examples_that_are_made_within_the_context():
    model = network()

    def attack(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return x.detach() + 0.1 * torch.autograd.grad(model(x).square().sum(), x)[0].sign()

    truth = one_at_a_time(model, model(attack(X)).square().sum(1))
    with ab.observe(model) as ledger:
        model(attack(X)).square().sum().backward()
    assert_exact(ledger, model, truth)


@pytest.mark.parametrize("where", ["whole", "terms", "divided"])
def test_under_a_grad_scaler_norms_are_those_of_the_loss_itself(where):
    model = network()
    truth = one_at_a_time(model, model(X).square().sum(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss() -> Tensor:
        losses = model(X).square()
        if where == "terms":
            return scaler.scale(losses[:, 0].sum()) + scaler.scale(losses[:, 1:].sum())
        return (
            scaler.scale(losses.sum()) if where == "whole" else scaler.scale(3 * losses.sum()) / 3
        )

    with ab.observe(model) as ledger:
        loss().backward()
    assert distance(ledger.norms, truth.norm(dim=1)) < BOUND
    assert distance(whole_gradient(model), 1024 * truth.sum(0)) < BOUND  # as the scaler needs it


@pytest.mark.parametrize("where", ["loss", "penalty"])
def test_a_parameter_that_meets_the_loss_of_the_whole_batch_is_refused(where):
    class Weighed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.scale = nn.Parameter(torch.zeros(()))

    model = Weighed().double()

    def loss() -> Tensor:
        losses = model(X).square().mean()
        return (
            losses * model.scale.exp() if where == "loss" else losses + model.weight.square().sum()
        )

    with ab.observe(model), pytest.raises(LedgerError, match="belongs to no example"):
        loss()


def test_what_the_ledger_did_not_see_is_said():
    model = network()
    with ab.observe(model):
        loss = model(X).sum()
    with pytest.raises(LedgerError, match="without the ledger"):
        loss.backward()  # after the context
    with pytest.raises(LedgerError, match="no backward pass has reached"), ab.observe(model):
        network()(X).sum().backward()  # another model
    with ab.observe(model) as ledger:
        model(X)
        with pytest.raises(LedgerError, match="Nothing was observed yet"):
            _ = ledger.norms


@pytest.mark.parametrize("how", ["grad", "inputs"])
def test_gradients_that_are_asked_for_by_name_are_refused(how):
    model = network()
    go_back = torch.autograd.grad if how == "grad" else torch.autograd.backward
    with ab.observe(model), pytest.raises(LedgerError, match="names parameters of the observed"):
        go_back(model(X).sum(), inputs=list(model.parameters()))


def test_the_librarys_own_update_is_refused_within_the_context():
    model = network()
    objective = ab.Objective(lambda model, x: model(x).square().sum(1))
    with ab.observe(model), pytest.raises(LedgerError, match=r"observe=ab\.Observe"):
        ab.batch_gradient(model, objective, X)


def test_what_cannot_be_observed_is_refused_at_the_start():
    model = network()
    twice = pytest.raises(LedgerError, match=r"two ab\.observe contexts")
    with twice, ab.observe(model), ab.observe(model[0]):
        pass
    with pytest.raises(LedgerError, match="without a parameter"), ab.observe(nn.Tanh()):
        pass
    with pytest.raises(LedgerError, match="at least 1"), ab.observe(model, examples=0):
        pass
    with pytest.raises(LedgerError, match="number of a dimension"), ab.observe(model, dim=0.5):
        pass


def test_parameters_that_are_unfrozen_within_the_context_are_refused():
    model = network()
    model[0].requires_grad_(False)
    with ab.observe(model):
        model(X).sum().backward()
        model[0].requires_grad_(True)
        with pytest.raises(LedgerError, match=r"have changed within ab\.observe"):
            model(X)


def test_a_gradient_that_differs_from_plain_autograds_is_refused(monkeypatch):
    """Test the check itself with a wrong rule, which no other test here would detect."""
    from anybatch.ledger.contractions.linear import Product

    model = network()
    with ab.observe(model):
        model(X).square().sum().backward()  # the plan is found
    right = Product.sum_gradients
    monkeypatch.setattr(Product, "sum_gradients", lambda self, c: -right(self, c))
    with ab.observe(model):
        for _ in range(8):
            model(X).square().sum().backward()
        with pytest.raises(LedgerError, match="plain autograd"):
            model(X).square().sum().backward()  # the 10th


def test_a_model_that_diverges_is_not_blamed_for_mixing_rows():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(float("inf"))
    with ab.observe(model) as ledger:
        model(X)[torch.arange(B).flip(0)].sum().backward()
        model(X).square().sum().backward()
    assert ledger.norms.shape == (2 * B,)
    assert not ledger.norms.isfinite().any()
