"""Five questions that practitioners ask about mini-batches, each answered by a measurement.

`ask()` computes every figure when it is called; none is quoted.
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
from anybatch.randomness import preserve_generators
from anybatch.reductions import Mean, Reduction, Sum

__all__ = ["Answer", "ask", "compute_worked_batch"]

T = TypeVar("T")


class Answer(NamedTuple):
    """Answer to one question, in words and in measured figures."""

    question: str
    answer: str  # in one or two plain sentences
    lines: tuple[str, ...]  # lines of measured figures, at most 76 characters each
    look: str  # a command that shows more, in a checkout of the project
    figures: dict[str, Any]  # the measured figures as numbers


def ask() -> list[Answer]:
    """Answer all five questions, in under a second on one core, after imports.

    It uses one thread: the problems are tiny, and threads would wait for each other.

    Example:
        >>> answer = ask()[0]
        >>> answer.figures["mean_loss"], answer.figures["gradient"][0]
        (0.0, 1.35)
    """
    questions = (
        answer_one_update,
        answer_sum_or_mean,
        answer_definition,
        answer_loop_or_batch,
        answer_max_pooling,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with preserve_generators(torch.device("cpu")):
            return [question() for question in questions]
    finally:
        torch.set_num_threads(threads)


def compute_worked_batch() -> dict[str, Any]:
    """Make one update by SGD of two losses g_i . w, whose mean is 0.

    Example:
        >>> batch = compute_worked_batch()
        >>> round(batch["loss"], 3), round(batch["after"][0], 3)
        (0.0, -0.135)

    Returns:
        Losses, gradients and weights before and after. The mean of the gradients is not 0.
    """
    lr = 0.1
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
        "mean": _flatten_gradient(model).tolist(),
        "lr": lr,
        "before": before,
        "after": model.weight.detach().flatten().tolist(),
    }


def answer_one_update() -> Answer:
    """Make one update from two examples whose losses cancel."""
    batch = compute_worked_batch()
    losses, mean, gradient, after = (batch[name] for name in ("losses", "loss", "mean", "after"))
    rows = zip(losses, batch["gradients"], strict=True)
    return Answer(
        "If one example has loss 2 and another -2, the mean loss is 0. Is the gradient 0 too?",
        "No. Gradients are averaged, not losses. Each example goes forward and back on its own. "
        "A weight whose mean gradient is 0 stays where it is.",
        (
            *(
                f"example {i}  loss {v:+.0f}  gradient {_format_row(g)}"
                for i, (v, g) in enumerate(rows, 1)
            ),
            f"mean       loss {abs(mean):2.0f}  gradient {_format_row(gradient)}",
            f"weights before  {_format_row(batch['before'])}",
            f"weights after   {_format_row(after)}   by SGD, rate {batch['lr']}",
        ),
        "python examples/one_update.py",
        {"losses": losses, "mean_loss": mean, "gradient": gradient, "weights": after},
    )


def answer_sum_or_mean(num_steps: int = 50, batch_size: int = 100, lr: float = 0.5) -> Answer:
    """Train with Mean at lr, and with Sum at lr/B with the penalty times B, or without."""
    a = 0.01
    mean = _train(Mean(), lr, a, num_steps, batch_size)
    converted = _train(Sum(), lr / batch_size, a * batch_size, num_steps, batch_size)
    unconverted = _train(Sum(), lr / batch_size, a, num_steps, batch_size)
    with_factor, without = _measure_distance(converted, mean), _measure_distance(unconverted, mean)
    return Answer(
        "Is it usual to minimise the mean loss over a batch, or the sum? Does it matter?",
        "Yes, the mean is usual. The sum is B times the mean, for a batch of B examples, and so "
        "is its gradient. Divide the learning rate by B and multiply the penalty by B: the "
        "updates are then the same.",
        (
            f"weights after {num_steps} updates, Sum against Mean, B = {batch_size}:",
            f"rate / B and penalty * B   {with_factor:.0e} apart (rounding)",
            f"rate / B alone             {without:.0e} apart",
        ),
        "python examples/sum_or_mean.py",
        {"distance_with_conversion": with_factor, "distance_without": without},
    )


def answer_definition() -> Answer:
    """Double a batch by repeating it, and compare the norms of the gradient."""
    x, y = _make_problem(32)
    ratios = {}
    for reduction in (Mean(), Sum()):
        norms = []
        for times in (1, 2):
            model = _make_classifier()
            batch_gradient(model, _make_objective(reduction), (x.repeat(times, 1), y.repeat(times)))
            norms.append(_flatten_gradient(model).norm())
        ratios[type(reduction).__name__.lower()] = float(norms[1] / norms[0])
    return Answer(
        "Sum or mean of the gradients? Which definition reproduces a paper?",
        "The mean, as a rule: its size does not depend on the batch size. To reproduce a paper, "
        "take the definition that its learning rate belongs to. A rate without a batch size and a "
        "reduction says nothing.",
        (
            "the same examples twice in the batch multiply the gradient's norm",
            f"by {ratios['mean']:.3f} under Mean",
            f"by {ratios['sum']:.3f} under Sum",
        ),
        "python examples/sum_or_mean.py",
        {"norm_ratio": ratios},
    )


def answer_loop_or_batch(batch_size: int = 32) -> Answer:
    """Compare the reference's item-by-item loop with the engine's vectorised batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
    ).double()
    x, y = torch.rand(batch_size, 1, 8, 8, dtype=torch.float64), torch.arange(batch_size) % 10
    network = _make_reference(model)
    loop_seconds, loop = _time(
        lambda: reference.batch_gradient(
            network, reference.SoftmaxCrossEntropy(), list(x.numpy()), y.tolist()
        )
    )
    batch_seconds, _ = _time(lambda: batch_gradient(model, _make_objective(Mean()), (x, y)))
    ratio = loop_seconds / batch_seconds
    distance = _measure_distance(
        _flatten_gradient(model), torch.from_numpy(reference.flatten(loop.gradients))
    )
    return Answer(
        "How does the mini-batch method work, step by step?",
        "1. Cut the data into batches. 2. Send each example forward and back. 3. Add up their "
        "gradients. 4. Divide by B and update the weights. 5. Repeat. One example at a time is the "
        "definition. All at once is the same update, computed faster.",
        (
            f"a small convolutional network, {batch_size} examples, both ways:",
            f"gradients   {distance:.0e} apart (rounding)",
            f"all at once is {ratio:.0f} times as fast",
        ),
        "python examples/step_by_step.py",
        {"distance": distance, "speed_ratio": ratio},
    )


def answer_max_pooling() -> Answer:
    """Send three examples through one window of four inputs, and go back."""
    x = torch.tensor([[1.0, 7, 2, 3], [4, 1, 9, 2], [5, 5, 0, 1]]).reshape(3, 1, 2, 2)
    x.requires_grad_()
    pooled, where = F.max_pool2d(x, 2, return_indices=True)
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    winners, rows = where.flatten().tolist(), gradient.reshape(3, 4).tolist()
    inputs = x.detach().reshape(3, 4).tolist()
    return Answer(
        "How does back-propagation pass a max-pooling layer when a batch goes through?",
        "Each example sends its gradient to its own winner, the largest input of the window. "
        "Nothing is split over the winners of the batch. Only gradients of weights are averaged.",
        tuple(
            f"example {i}  window {_format_row(window)}  gradient {_format_row(row)}"
            + ("  tie: first wins" if window.count(max(window)) > 1 else "")
            for i, (window, row) in enumerate(zip(inputs, rows, strict=True), 1)
        ),
        "python examples/step_by_step.py",
        {"winners": winners, "gradients": rows},
    )


def _make_reference(model: nn.Sequential) -> reference.Network:
    """Make the NumPy network with the layers and weights of a model."""
    layers: list[reference.Layer] = [
        reference.Conv2d(1, 6, 3),
        reference.ReLU(),
        reference.MaxPool2d(2),
        reference.Flatten(),
        reference.Dense(54, 10),
    ]
    parameters = [{n: p.detach().numpy() for n, p in m.named_parameters()} for m in model]
    return reference.Network(layers, parameters)


def _make_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(20, 5, dtype=torch.float64)


def _make_problem(num_examples: int) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(num_examples, 20)))
    return x, x[:, :5].argmax(1)


def _make_objective(reduction: Reduction, penalty: L2 | None = None) -> Objective:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return Objective(losses, reduction=reduction, penalty=penalty)


def _train(reduction: Reduction, lr: float, a: float, num_steps: int, batch_size: int) -> Tensor:
    model = _make_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(num_steps):
        batch_gradient(model, _make_objective(reduction, L2(a)), _make_problem(batch_size))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _time(work: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds of the fastest of three calls, and the result."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def _flatten_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _measure_distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((a - b).norm() / b.norm())


def _format_row(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value + 0.0:.4g}' for value in values)})"  # + 0.0: no -0
