"""Evaluation of losses with derivatives in them, of scripted models, and in inference mode.

Oracle: the same losses by plain PyTorch over all examples at once, in evaluation mode.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch.errors import LossError, ModelError
from anybatch.gradient.survey import check_parameter

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gradient_penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    score = model(x).sum(1)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score + 10 * (slope.norm(dim=1) - 1) ** 2


def second_derivative(model, batch):
    """Compute the residual u'' - y of a differential equation in the first input."""
    x = batch[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return (second[:, 0] - batch[1]) ** 2


def adversarial(model, batch):
    x = batch[0].clone().requires_grad_()
    F.cross_entropy(model(x), batch[1], reduction="sum").backward()
    return F.cross_entropy(model(x + 0.1 * x.grad.sign()), batch[1], reduction="none")


def by_transform(model, batch):
    return torch.func.vmap(torch.func.jacrev(model))(batch[0]).square().sum((1, 2))


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def normalise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model(3 * X)  # so that the statistics are not those of the start
    return model


LOSSES = [cross_entropy, gradient_penalty, second_derivative, adversarial, by_transform]


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("micro_batch", [12, 5])
def test_losses_with_derivatives_are_evaluated(losses, micro_batch):
    model = linear()
    model.weight.grad = old_gradient = torch.ones_like(model.weight)
    evaluation = ab.evaluate(model, ab.Objective(losses), (X, Y), micro_batch=micro_batch)
    assert model.weight.grad is old_gradient
    assert model.bias.grad is None
    assert torch.equal(old_gradient, torch.ones_like(old_gradient))
    expected = losses(copy.deepcopy(model), (X, Y)).mean().item()
    assert evaluation.loss == pytest.approx(expected, rel=1e-5)  # float32
    other = losses(copy.deepcopy(model), (-X, Y)).mean().item()
    if losses is not by_transform:  # the control; the Jacobian of a linear model is one for all
        assert evaluation.loss != pytest.approx(other, rel=1e-3)


def test_no_graph_is_built_where_none_is_needed_and_draws_are_those_of_the_seed():
    modes = []

    def losses(model, batch):
        modes.append(torch.is_grad_enabled())
        noise = torch.rand(len(batch[0]))
        return gradient_penalty(model, batch) + noise if noisy else cross_entropy(model, batch)

    noisy = False
    ab.evaluate(linear(), ab.Objective(losses), (X, Y), micro_batch=4)
    assert modes == [False] * 3
    noisy = True
    modes.clear()
    first = ab.evaluate(linear(), ab.Objective(losses), (X, Y), micro_batch=4)
    assert modes == [False, True, True, True]  # the first micro-batch is begun again
    torch.manual_seed(5)
    assert ab.evaluate(linear(), ab.Objective(losses), (X, Y), micro_batch=4) == first


def test_another_error_of_a_loss_comes_through():
    def losses(model, batch):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        ab.evaluate(linear(), ab.Objective(losses), (X, Y))


# --------------------------------------------------------------------------- scripted models


class Counts(nn.Module):
    """A model whose forward pass changes a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


MODELS = {
    "scripted": lambda: torch.jit.script(normalise()),
    "scripted inside": lambda: nn.Sequential(torch.jit.script(normalise())),
    "scripted, with a buffer that changes": lambda: torch.jit.script(Counts()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_scripted_models_are_evaluated_and_left_as_they_were(kind):
    model = MODELS[kind]()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    evaluation = ab.evaluate(model, ab.Objective(cross_entropy), (X, Y), micro_batch=5)
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    expected = cross_entropy(model.eval(), (X, Y)).mean().item()
    assert evaluation.loss == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_models_are_trained_as_they_are_unscripted():
    evaluation = {}
    for is_scripted in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        model = torch.jit.script(model) if is_scripted else model
        ab.batch_gradient(model, ab.Objective(cross_entropy), (X, Y))
        evaluation[is_scripted] = [p.grad for p in model.parameters()] + list(model.buffers())
    for a, b in zip(evaluation[False], evaluation[True], strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7)  # float32
    assert any(g.norm() > 0.01 for g in evaluation[True])


# ---------------------------------------------------------------- inference mode and narrow types


@pytest.mark.parametrize("losses", [cross_entropy, gradient_penalty])
def test_inference_mode_around_an_evaluation_changes_nothing(losses):
    model = normalise()
    expected = ab.evaluate(model, ab.Objective(losses), (X, Y), micro_batch=5)
    with torch.inference_mode():
        data = X.clone(), Y.clone()
        assert ab.evaluate(model, ab.Objective(losses), data, micro_batch=5) == expected
        assert torch.is_inference_mode_enabled()
        ours = copy.deepcopy(model)
    assert ab.evaluate(ours, ab.Objective(cross_entropy), (X, Y)).num_examples == 12


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)]
)
def test_models_of_any_type_are_evaluated(dtype, rounding):
    model = normalise().to(dtype)
    evaluation = ab.evaluate(model, ab.Objective(cross_entropy), (X.to(dtype), Y), micro_batch=5)
    # Against float64 with the same weights: some roundings of the type.
    exact = copy.deepcopy(model).double().eval()
    expected = cross_entropy(exact, (X.to(dtype).double(), Y)).mean().item()
    assert evaluation.loss == pytest.approx(expected, rel=rounding)
    assert cross_entropy(exact, (-X.double(), Y)).mean().item() != pytest.approx(
        evaluation.loss, rel=0.02
    )


# ------------------------------------------------------------------------- models without values


def lazy():
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))


def on_meta():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lazy, r"1\.weight has no shape yet.* Call the model on a few examples first"),
        (on_meta, r"1\.weight is on the meta device.*to_empty"),
    ],
)
def test_a_model_without_values_is_refused_by_the_parameter(make, message):
    model = make()
    with pytest.raises(ModelError, match=message):
        ab.evaluate(model, ab.Objective(cross_entropy), (X, Y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = ab.Order(12, batch_size=4)
    with pytest.raises(ModelError, match=message):
        next(ab.steps(model, ab.Objective(cross_entropy), optimizer, (X, Y), order=order, epochs=1))


def test_a_lazy_model_that_has_been_called_is_trained():
    model = lazy()
    with torch.no_grad():
        model(X)
    ab.batch_gradient(model, ab.Objective(cross_entropy), (X, Y))
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_of_inference_mode_is_refused_for_training_alone():
    with torch.inference_mode():
        parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ModelError, match=r"head\.weight was made under torch\.inference_mode"):
        check_parameter("head.weight", parameter)
    assert check_parameter("head.weight", parameter, trains=False) is None
    assert check_parameter("weight", nn.Parameter(torch.ones(3))) is None


def test_an_exported_model_that_has_no_modes_is_refused():
    class Exported(nn.Linear):
        def eval(self):
            raise NotImplementedError("Calling eval() is not supported yet.")

    with pytest.raises(ModelError, match=r"cannot be put in evaluation mode: Calling eval\(\)"):
        ab.evaluate(Exported(4, 3), ab.Objective(cross_entropy), (X, Y))


# -------------------------------------------------------------------------------- a last example


def squeeze_outputs(model, batch):
    return model(batch[0]).squeeze()


def test_a_squeeze_of_one_example_is_named():
    model = nn.Linear(4, 1)
    with pytest.raises(LossError, match=r"shape \(\) for a batch of 1 .* write squeeze\(-1\)"):
        ab.batch_gradient(
            model, ab.Objective(squeeze_outputs), (X, Y), layout=ab.Layout(micro_batch=11)
        )
    with pytest.raises(LossError, match=r"write squeeze\(-1\), or \[:, 0\]"):
        ab.evaluate(model, ab.Objective(squeeze_outputs), (X, Y), micro_batch=11)
    with pytest.raises(LossError, match=r"shape \(\) for a batch of 12 .* return counts\.$"):
        ab.batch_gradient(model, ab.Objective(lambda m, b: m(b[0]).mean()), (X, Y))
    ab.batch_gradient(model, ab.Objective(squeeze_outputs), (X, Y), layout=ab.Layout(micro_batch=4))
