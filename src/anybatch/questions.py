"""Five questions that practitioners ask about mini-batches, each answered by a measurement.

Nothing here is quoted: `ask()` computes every figure at the moment it is asked.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch import reference
from anybatch.gradient import batch_gradient
from anybatch.objective import Objective
from anybatch.penalties import L2
from anybatch.randomness import generators_restored
from anybatch.reductions import Mean, Reduction, Sum

__all__ = ["Answer", "ask", "worked_batch"]

T = TypeVar("T")


class Answer(NamedTuple):
    """One question, what was measured, and where to look further."""

    question: str
    measured: str
    look: str  # a command, in a checkout of the project
    figures: dict[str, Any]  # what was measured, as numbers


def ask() -> list[Answer]:
    """Ask all five: under a second on one core, once everything is imported.

    On one thread: the problems are tiny, and threads would only wait for each other.
    """
    asked = one_update, sum_or_mean, which_definition, loop_or_batch, through_max_pooling
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with generators_restored(torch.device("cpu")):
            return [question() for question in asked]
    finally:
        torch.set_num_threads(threads)


def worked_batch(lr: float = 0.1) -> dict[str, Any]:
    """One update by SGD of losses g_i . w: their mean is 0, the mean of their gradients is not."""
    g = torch.tensor(
        [[1.5, -2.0, 1.1, 0.4, -0.9], [1.2, 2.3, -1.1, -0.8, -0.7]], dtype=torch.float64
    )
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0, 0, 0, 3.2, -0.8]], dtype=torch.float64))
    before = model.weight.detach().flatten().tolist()
    gradient = batch_gradient(model, Objective(lambda m, x: m(x)[:, 0]), g)
    torch.optim.SGD(model.parameters(), lr=lr).step()
    return {
        "losses": gradient.losses.values.tolist(),
        "loss": float(gradient.loss),
        "gradients": g.tolist(),
        "norms": g.norm(dim=1).tolist(),
        "mean": _gradient_of(model).tolist(),
        "lr": lr,
        "before": before,
        "after": model.weight.detach().flatten().tolist(),
    }


def one_update() -> Answer:
    """The worked batch: do losses that cancel have gradients that cancel?"""
    found = worked_batch()
    losses, mean, by, moved = (found[name] for name in ("losses", "loss", "mean", "after"))
    return Answer(
        "If one example has loss 2 and another -2, the mean loss is 0: is the gradient zero too?",
        f"No. Losses {losses[0]:+.0f} and {losses[1]:+.0f}, mean {abs(mean):.0f}; the mean of the "
        f"gradients is {_row(by)}. SGD at {found['lr']} moves w to {_row(moved)}. "
        f"Gradients are averaged, not losses.",
        "python examples/one_update.py",
        {"losses": losses, "mean_loss": mean, "gradient": by, "weights": moved},
    )


def sum_or_mean(num_steps: int = 50, batch_size: int = 100, lr: float = 0.5) -> Answer:
    """Train with Mean at lr, and with Sum at lr/B with the penalty times B, or without."""
    a = 0.01
    mean = _trained(Mean(), lr, a, num_steps, batch_size)
    carried = _trained(Sum(), lr / batch_size, a * batch_size, num_steps, batch_size)
    careless = _trained(Sum(), lr / batch_size, a, num_steps, batch_size)
    with_factor, without = _distance(carried, mean), _distance(careless, mean)
    return Answer(
        "Is it usual to minimise the mean loss over a batch, or the sum? Does it matter?",
        f"The rate absorbs the factor, the penalty does not: after {num_steps} updates Sum at lr/B "
        f"is {with_factor:.0e} from Mean at lr if the penalty is multiplied by B "
        f"= {batch_size}, and {without:.0e} if it is not.",
        "python examples/sum_or_mean.py",
        {"distance_with_conversion": with_factor, "distance_without": without},
    )


def which_definition() -> Answer:
    """Double a batch by repeating it: the norm of the gradient under Mean and Sum."""
    x, y = _problem(32)
    ratios = {}
    for reduction in (Mean(), Sum()):
        norms = []
        for times in (1, 2):
            model = _classifier()
            batch_gradient(model, _objective(reduction), (x.repeat(times, 1), y.repeat(times)))
            norms.append(_gradient_of(model).norm())
        ratios[type(reduction).__name__.lower()] = float(norms[1] / norms[0])
    return Answer(
        "Sum or mean of the gradients? Which definition reproduces a paper?",
        f"The one that the paper's rate belongs to. Doubling the batch multiplies the norm of the "
        f"gradient by {ratios['mean']:.3f} under Mean and by {ratios['sum']:.3f} under Sum, so a "
        f"rate stated without its batch size and reduction says nothing.",
        "python examples/sum_or_mean.py",
        {"norm_ratio": ratios},
    )


def loop_or_batch(batch_size: int = 32) -> Answer:
    """The reference's item-by-item loop against the engine's vectorised batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
    ).double()
    x, y = torch.rand(batch_size, 1, 8, 8, dtype=torch.float64), torch.arange(batch_size) % 10
    network = _reference_of(model)
    loop_seconds, loop = _timed(
        lambda: reference.batch_gradient(
            network, reference.SoftmaxCrossEntropy(), list(x.numpy()), y.tolist()
        )
    )
    batch_seconds, _ = _timed(lambda: batch_gradient(model, _objective(Mean()), (x, y)))
    ratio = loop_seconds / batch_seconds
    distance = _distance(_gradient_of(model), torch.from_numpy(reference.flat(loop.gradients)))
    return Answer(
        "How does the mini-batch method work, step by step?",
        f"Forward and back for each of {batch_size} examples, sum, divide, update: that loop is "
        f"the definition. All at once is the implementation: {ratio:.0f} "
        f"times as fast, and {distance:.0e} away.",
        "python examples/step_by_step.py",
        {"distance": distance, "speed_ratio": ratio},
    )


def through_max_pooling() -> Answer:
    """One window of four inputs, three examples: who wins, and who gets the gradient."""
    x = torch.tensor([[1.0, 7, 2, 3], [4, 1, 9, 2], [5, 5, 0, 1]]).reshape(3, 1, 2, 2)
    x.requires_grad_()
    pooled, where = F.max_pool2d(x, 2, return_indices=True)
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    winners, rows = where.flatten().tolist(), gradient.reshape(3, 4).tolist()
    return Answer(
        "How does back-propagation pass a max-pooling layer when a batch goes through?",
        f"Each example by its own winner. One window, three examples, winners at "
        f"{', '.join(map(str, winners))} (the third is a tie: the first wins); gradients "
        f"{'; '.join(map(_row, rows))}. Nothing is split, nothing is aggregated before the sum.",
        "python examples/step_by_step.py",
        {"winners": winners, "gradients": rows},
    )


def _reference_of(model: nn.Sequential) -> reference.Network:
    """The same network with the same weights, in NumPy."""
    layers: list[reference.Layer] = [
        reference.Conv2d(1, 6, 3),
        reference.ReLU(),
        reference.MaxPool2d(2),
        reference.Flatten(),
        reference.Dense(54, 10),
    ]
    parameters = [{n: p.detach().numpy() for n, p in m.named_parameters()} for m in model]
    return reference.Network(layers, parameters)


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(20, 5, dtype=torch.float64)


def _problem(num_examples: int) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(num_examples, 20)))
    return x, x[:, :5].argmax(1)


def _objective(reduction: Reduction, penalty: L2 | None = None) -> Objective:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return Objective(losses, reduction=reduction, penalty=penalty)


def _trained(reduction: Reduction, lr: float, a: float, num_steps: int, batch_size: int) -> Tensor:
    model = _classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(num_steps):
        batch_gradient(model, _objective(reduction, L2(a)), _problem(batch_size))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the fastest of three, and the result."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds), result


def _gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a - b).norm() / b.norm())


def _row(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value + 0.0:.4g}' for value in values)})"  # + 0.0: no -0
