"""Rows of docs/conventions.md: what other programs divide by, seen in what they compute.

Oracle: plain autograd on the formula that the page states. Each check has the other formula next to
it, which must differ.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

TOLERANCE = 1e-12  # float64, a few operations


def make_problem(num_examples: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a linear classifier of three classes and a batch, in float64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    inputs = torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)
    return model, inputs, torch.arange(num_examples) % 3


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient of a loss by all parameters, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def flat_grad(model: nn.Module) -> Tensor:
    """Return `.grad` of all parameters, flat."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def run_ddp_rank(rank: int, folder: str) -> None:
    """Save the gradient of `DistributedDataParallel`, 6 examples on one rank and 2 on the other."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, inputs, classes = make_problem(8)
    ours = slice(0, 6) if rank == 0 else slice(6, 8)
    parallel = nn.parallel.DistributedDataParallel(model)
    F.cross_entropy(parallel(inputs[ours]), classes[ours]).backward()
    torch.save(flat_grad(model), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_takes_the_mean_of_the_means_of_its_ranks(tmp_path: Path) -> None:
    mp.spawn(run_ddp_rank, (str(tmp_path),), nprocs=2)
    model, inputs, classes = make_problem(8)
    losses = F.cross_entropy(model(inputs), classes, reduction="none")
    mean_of_means = gradient_of(model, (losses[:6].mean() + losses[6:].mean()) / 2)
    losses = F.cross_entropy(model(inputs), classes, reduction="none")
    mean = gradient_of(model, losses.mean())
    theirs = torch.load(tmp_path / "0")
    assert distance(theirs, mean_of_means) < TOLERANCE
    assert distance(theirs, mean) > 0.01


def test_backward_alone_adds_up() -> None:
    model, inputs, classes = make_problem(8)
    for ours in (slice(0, 4), slice(4, 8)):
        F.cross_entropy(model(inputs[ours]), classes[ours]).backward()
    theirs = flat_grad(model)
    mean = gradient_of(model, F.cross_entropy(model(inputs), classes))
    assert distance(theirs, 2 * mean) < TOLERANCE
    assert distance(theirs, mean) > 0.5


@pytest.mark.parametrize("num_micro_batches", [4, 2])
def test_accelerate_divides_by_the_number_it_was_told(num_micro_batches: int) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the audit extra is not installed")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model, inputs, classes = make_problem(8)
    size = 2
    for start in range(0, size * num_micro_batches, size):
        ours = slice(start, start + size)
        accelerator.backward(F.cross_entropy(model(inputs[ours]), classes[ours]))
    theirs = flat_grad(model)
    output = slice(0, size * num_micro_batches)
    mean = gradient_of(model, F.cross_entropy(model(inputs[output]), classes[output]))
    assert distance(theirs, num_micro_batches / 4 * mean) < TOLERANCE
    assert num_micro_batches == 4 or distance(theirs, mean) > 0.4


def test_a_smaller_last_batch_weighs_its_examples_more() -> None:
    model, inputs, classes = make_problem(8)
    losses = F.cross_entropy(model(inputs), classes, reduction="none")
    losses.retain_grad()
    (losses[:6].mean() + losses[6:].mean()).backward()
    weights = losses.grad
    assert weights is not None
    assert weights.tolist() == pytest.approx([1 / 6] * 6 + [1 / 2] * 2)


def test_weight_decay_of_sgd_reaches_biases_too() -> None:
    model, inputs, classes = make_problem(8)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = gradient_of(model, F.cross_entropy(model(inputs), classes))
    F.cross_entropy(model(inputs), classes).backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5).step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert distance((before - after) / 0.1, gradient + 0.5 * before) < TOLERANCE
    without_biases = torch.where(torch.arange(len(before)) < 12, before, 0)
    assert distance((before - after) / 0.1, gradient + 0.5 * without_biases) > 0.01


@pytest.mark.parametrize("num_examples", [5, 12])
def test_the_penalty_of_sklearns_network_is_divided_by_the_batch(num_examples: int) -> None:
    alpha, rate = 3.0, 0.01
    _, inputs, classes = make_problem(num_examples)
    network = MLPClassifier(
        (6,), activation="tanh", solver="sgd", alpha=alpha, learning_rate_init=rate,
        momentum=0, batch_size=num_examples, random_state=0, shuffle=False,
    )  # fmt: skip
    network.partial_fit(inputs.numpy(), classes.numpy(), classes=np.arange(3))
    weights = [torch.tensor(w) for w in (*network.coefs_, *network.intercepts_)]
    network.partial_fit(inputs.numpy(), classes.numpy())
    moved = [
        (w - torch.tensor(after)) / rate
        for w, after in zip(weights, (*network.coefs_, *network.intercepts_), strict=True)
    ]

    def gradients(factor: float) -> list[Tensor]:
        a, b, c, d = (w.clone().requires_grad_() for w in weights)
        outputs = (inputs @ a + c).tanh() @ b + d
        penalty = factor / 2 * (a.square().sum() + b.square().sum())
        return list(torch.autograd.grad(F.cross_entropy(outputs, classes) + penalty, [a, b, c, d]))

    def flatten(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in tensors])

    # The weights move by rate * gradient, 0.01 of their size, so two digits are lost.
    assert distance(flatten(moved), flatten(gradients(alpha / num_examples))) < 1e-10
    assert distance(flatten(moved), flatten(gradients(alpha))) > 0.1


def test_sklearns_logistic_regression_minimises_c_times_the_sum() -> None:
    _, inputs, classes = make_problem(30)
    c = 0.5
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
    model.fit(inputs.numpy(), classes.numpy())
    weight = torch.tensor(model.coef_, requires_grad=True)
    bias = torch.tensor(model.intercept_, requires_grad=True)

    def slope(factor: float) -> float:
        losses = F.cross_entropy(inputs @ weight.T + bias, classes, reduction="none")
        loss = factor * losses.sum() + weight.square().sum() / 2
        return max(g.abs().max().item() for g in torch.autograd.grad(loss, [weight, bias]))

    assert slope(c) < 1e-4  # lbfgs stops near the minimum
    assert slope(c / 30) > 0.01


def test_lightning_divides_by_accumulate_grad_batches(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="the lightning extra is missing")
    from lightning_trainers import fit, make_trainer

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.gradients: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.w * batch[0]).mean()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.gradients.append(float(self.w.grad))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, data = Module(), torch.arange(1.0, 9.0).double()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2)
    fit(make_trainer(tmp_path, accumulate_grad_batches=3), module, loader)
    means = data.reshape(4, 2).mean(1)
    # The last window holds one micro-batch, and is divided by 3 all the same.
    assert module.gradients == pytest.approx([float(means[:3].sum()) / 3, float(means[3]) / 3])


def test_keras_divides_by_the_batch_and_carries_a_short_window_on(monkeypatch: Any) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="the keras extra is missing")
    targets, outputs = torch.zeros(4, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0])
    loss = keras.losses.MeanSquaredError()(targets, outputs, sample_weight=weights)
    assert float(loss) == pytest.approx(float((weights * outputs[:, 0] ** 2).sum()) / 4)
    assert float(keras.regularizers.L2(0.1)(outputs)) == pytest.approx(0.1 * 30)

    variable = keras.Variable([0.0])
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    values = []
    for gradient in (1.0, 3.0, 5.0, 9.0):
        optimizer.apply([torch.tensor([gradient])], [variable])
        values.append(float(variable.value.detach()))
    assert values == [0, -2, -2, -9]  # the third waits for the fourth
