"""Sound models that the self-check must let pass, and the same models with a 1 % coupling.

Oracle: none is needed for silence; the control is `couple`, which the check must find in each. The
models differ in what they do to rounding: depth, cancellation, normalisation, routing, recurrence,
narrow types, copies that fail, weights that are computed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch import zoo
from anybatch.errors import ModelError


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def vectors(*shape, dtype=torch.float32):
    return torch.randn(16, *shape, dtype=dtype), torch.randint(10, (16,))


def perceptron(depth=1):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def residual(*, dtype=torch.float32):
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            return x + self.conv(F.relu(self.norm(x)))

    blocks = [Block(16) for _ in range(6)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, *head).to(dtype)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(16, 32, 2, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.first, self.inner = nn.Linear(64, 64), perceptron()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.features = perceptron(), []
        self.net[0].register_forward_hook(lambda m, i, o: self.features.append(o))

    def forward(self, x):
        return self.net(x)


class Uncopied(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.numbers = perceptron(), (i for i in range(3))

    def forward(self, x):
        return self.net(x)


class Even(nn.Module):
    """Takes pairs of examples."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()

    def forward(self, x):
        pairs = self.net(x).unflatten(0, (len(x) // 2, 2))  # an odd number of examples fails
        return pairs.flatten(0, 1)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.ModuleList(perceptron() for _ in range(4))

    def forward(self, x):
        weights, selection = self.gate(x).softmax(1).topk(2)
        out = x.new_zeros(len(x), 10)
        for i, expert in enumerate(self.experts):
            rows, place = (selection == i).nonzero(as_tuple=True)
            out = out.index_add(0, rows, (weights[rows, place, None] * expert(x[rows])).float())
        return out


def use_weight_norm():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))
    model(torch.randn(2, 64)).sum().backward()  # its weight is no leaf now: deepcopy fails
    return model


def at_its_optimum():
    model, (x, y) = perceptron(0), vectors(64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def loss():
        optimizer.zero_grad()
        total = entropy(model, (x, y)).mean() + 0.01 * model[0].weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return model, (x, y)


def pair_up(model, batch):
    return F.normalize(model(batch[0]), dim=1)


def contrast(losses):
    z = losses.values
    return F.cross_entropy(10 * z @ z.T - 99 * torch.eye(len(z)), torch.arange(len(z)).roll(1))


SOUND = {
    "perceptron": lambda: (perceptron(), vectors(64)),
    "40 layers": lambda: (perceptron(40), vectors(64)),
    "lenet": lambda: (zoo.lenet(), vectors(1, 28, 28)),
    "residual": lambda: (residual(), vectors(3, 12, 12)),
    "residual, float64": lambda: (
        residual(dtype=torch.float64),
        vectors(3, 12, 12, dtype=torch.float64),
    ),
    "recurrent": lambda: (Recurrent(), vectors(9, 16)),
    "checkpointed": lambda: (Checkpointed(reentrant=False), vectors(64)),
    "checkpointed, reentrant": lambda: (Checkpointed(reentrant=True), vectors(64)),
    "scripted": lambda: (torch.jit.script(perceptron()), vectors(64)),
    "traced": lambda: (torch.jit.trace(perceptron(), torch.randn(2, 64)), vectors(64)),
    "compiled": lambda: (torch.compile(perceptron(), backend="eager"), vectors(64)),
    "hooked": lambda: (Hooked(), vectors(64)),
    "uncopied": lambda: (Uncopied(), vectors(64)),
    "even": lambda: (Even(), vectors(64)),
    "routed": lambda: (Routed(), vectors(64)),
    "weight norm, used": lambda: (use_weight_norm(), vectors(64)),
    "large inputs": lambda: (perceptron(), (1e6 * torch.randn(16, 64), torch.randint(10, (16,)))),
    "at its optimum": at_its_optimum,
}


UNFIT = {"scripted", "traced", "40 layers"}
"""These take no hooks once made, or hardly depend on their inputs."""


def couple(model):
    """Mix 1 % of the mean over the batch into what the first layer with weights gives."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def mix(module, inputs, out):
        return out + 0.01 * (out.mean(0, keepdim=True) - out)

    return layers[0].register_forward_hook(mix)


@pytest.mark.fast(11)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_models_pass(name, precision):
    for seed in range(3):
        torch.manual_seed(seed)
        model, batch = SOUND[name]()
        how = {"layout": ab.Layout(6), "precision": precision}
        assert ab.batch_gradient(model, ab.Objective(entropy), batch, **how).is_finite


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(set(SOUND) - UNFIT))
def test_a_small_coupling_in_one_layer_of_each_is_found(name):
    torch.manual_seed(0)
    model, batch = SOUND[name]()
    couple(model)
    with pytest.raises(ModelError, match="depends on how they are cut"):
        ab.batch_gradient(model, ab.Objective(entropy), batch, layout=ab.Layout(6))


def test_the_amplified_rounding_of_a_contrastive_loss_passes():
    for seed in range(10):
        torch.manual_seed(seed)
        model = perceptron(3)
        objective = ab.Objective(pair_up, contrast)
        assert ab.batch_gradient(model, objective, vectors(64), layout=ab.Layout(6)).is_finite
