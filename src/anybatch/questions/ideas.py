"""Six wrong ideas of a batch's gradient, measured on one small network.

    right    g = (1/B) sum_i grad l_i(w) + a w           distance  |g_wrong - g| / |g|
                                                         cosine    g_wrong . g / (|g_wrong| |g|)

l_i is the loss of example i, B the number of examples, a the strength of the L2 penalty (biases
have none). The network is a convolution, ReLU, max-pooling and a linear layer, on handwritten
digits of 8x8 pixels. Weights and batches come from NumPy's generator, so anybody can repeat the
figures without this package.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.data import load_digits
from anybatch.gradient import batch_gradient
from anybatch.objective import Objective
from anybatch.penalties import L2
from anybatch.randomness import preserve_generators

__all__ = ["WrongIdea", "wrong_ideas"]

BATCH, LR, PENALTY = 60, 0.3, 0.01
SHAPES = ((6, 1, 3, 3), (6,), (10, 54), (10,))

Scalar = Callable[[nn.Sequential, Tensor, Tensor], Tensor]


class WrongIdea(NamedTuple):
    """One way to compute a gradient: its distance from the right one, and the loss it leads to."""

    name: str
    distance: float  # from the right gradient, over the norm of the right gradient
    cosine: float  # of the angle to the right gradient: 1 is the same direction
    loss: float  # mean loss of all digits plus penalty, after the updates
    curve: tuple[tuple[int, float], ...]  # number of updates and the loss: at 0, 10, ...


def wrong_ideas(num_updates: int = 100) -> list[WrongIdea]:
    """Measure the right gradient and six wrong ones, and train with each.

    Each row trains from the same initial weights, by SGD on the same batches. Distance and cosine
    are those at the weights that the right gradient leads to, on the next batch.

    Args:
        num_updates: the number of updates of each training.

    Returns:
        Seven rows; the first is the right gradient.

    Raises:
        DataError: scikit-learn, which holds the digits, is not installed.

    Example:
        >>> right, *wrong = wrong_ideas(num_updates=10)
        >>> f"{right.distance:.1f} {right.cosine:.1f}"
        '0.0 1.0'
        >>> [idea.name for idea in wrong if idea.cosine > 0.999]
        ['accumulation not divided']
        >>> [num_updates for num_updates, loss in right.curve]
        [0, 10]
    """
    images, classes = _read_digits()
    batches = list(_draw_batches(len(classes), num_updates + 1))
    trained, _ = _train(_find_gradients("right"), images, classes, batches[:-1])
    next_batch = images[batches[-1]], classes[batches[-1]]
    right = _flatten(_find_gradients("right")(trained, *next_batch))
    rows = []
    for name in IDEAS:
        gradient = _flatten(_find_gradients(name)(trained, *next_batch))
        _, curve = _train(_find_gradients(name), images, classes, batches[:-1])
        distance = float((gradient - right).norm() / right.norm())
        cosine = float(gradient @ right / gradient.norm() / right.norm())
        rows.append(WrongIdea(name, distance, cosine, curve[-1][1], curve))
    return rows


def _last_example_only(model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    return _compute_losses(model, (images, classes))[-1] + _compute_penalty(model)


def _mean_error_signal(model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    """Average the errors at the output, and send them back once, through the mean image."""
    with torch.no_grad():
        errors = model(images).softmax(1) - F.one_hot(classes, 10)
    outputs: Tensor = model(images.mean(0, keepdim=True))[0]
    loss: Tensor = (outputs * errors.mean(0)).sum() + _compute_penalty(model)
    return loss


def _split_over_winners(model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    """Split each window's gradient evenly over the inputs that win in any example."""
    windows = model[1](model[0](images)).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    wins = F.one_hot(windows.argmax(-1), 4).amax(0).to(windows.dtype)
    shared = (windows * (wins / wins.sum(-1, keepdim=True))).sum(-1)
    # The value is the maximum; only the backward pass is that of `shared`.
    pooled = windows.detach().amax(-1) + shared - shared.detach()
    return F.cross_entropy(model[4](pooled.flatten(1)), classes) + _compute_penalty(model)


def _mean_of_unequal_means(model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    parts = torch.split(_compute_losses(model, (images, classes)), 18)  # 18, 18, 18 and 6
    return torch.stack([part.mean() for part in parts]).mean() + _compute_penalty(model)


def _penalty_once_a_micro_batch(model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    return _compute_losses(model, (images, classes)).mean() + 4 * _compute_penalty(model)


def _accumulation_not_divided(model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    parts = torch.split(_compute_losses(model, (images, classes)), 15)
    return torch.stack([part.mean() for part in parts]).sum() + _compute_penalty(model)


# The scalar whose gradient each idea takes; the right one is the library's own.
IDEAS: dict[str, Scalar | None] = {
    "right": None,
    "last example only": _last_example_only,
    "mean error signal": _mean_error_signal,
    "gradient split over winners": _split_over_winners,
    "mean of unequal means": _mean_of_unequal_means,
    "penalty once a micro-batch": _penalty_once_a_micro_batch,
    "accumulation not divided": _accumulation_not_divided,
}

Gradients = Callable[[nn.Sequential, Tensor, Tensor], list[Tensor]]


def _find_gradients(name: str) -> Gradients:
    """Find the function that computes an idea's gradients."""
    scalar = IDEAS[name]

    def gradients(model: nn.Sequential, images: Tensor, classes: Tensor) -> list[Tensor]:
        if scalar is not None:
            return list(
                torch.autograd.grad(scalar(model, images, classes), list(model.parameters()))
            )
        batch_gradient(model, Objective(_compute_losses, penalty=L2(PENALTY)), (images, classes))
        return [p.grad for p in model.parameters() if p.grad is not None]

    return gradients


def _train(
    gradients: Gradients, images: Tensor, classes: Tensor, batches: list[Tensor]
) -> tuple[nn.Sequential, tuple[tuple[int, float], ...]]:
    """Return the trained network, and its loss at the start, every tenth update and the end."""
    model = _make_network()
    curve = [(0, _measure_loss(model, images, classes))]
    for number, ids in enumerate(batches, start=1):
        step = gradients(model, images[ids], classes[ids])
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), step, strict=True):
                parameter.sub_(LR * gradient)
        if number % 10 == 0 or number == len(batches):
            curve.append((number, _measure_loss(model, images, classes)))
    return model, tuple(curve)


def _measure_loss(model: nn.Sequential, images: Tensor, classes: Tensor) -> float:
    """Return the mean loss of all digits plus the penalty."""
    with torch.no_grad():
        return float(_compute_losses(model, (images, classes)).mean() + _compute_penalty(model))


def _make_network() -> nn.Sequential:
    """Build the network, with normal weights of standard deviation 1 / sqrt(inputs)."""
    with preserve_generators(torch.device("cpu")):  # layers draw weights, which are replaced
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
        ).double()
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for parameter, shape in zip(model.parameters(), SHAPES, strict=True):
            weights = generator.normal(size=shape) if len(shape) > 1 else np.zeros(shape)
            parameter.copy_(torch.from_numpy(weights) / np.sqrt(np.prod(shape[1:])))
    return model


def _read_digits() -> tuple[Tensor, Tensor]:
    images, classes = load_digits()[:2]
    return images.double().reshape(-1, 1, 8, 8), classes.long()


def _draw_batches(num_examples: int, num_batches: int) -> Iterator[Tensor]:
    """Shuffle the examples anew for each epoch; the short end of an epoch is left out."""
    generator = np.random.default_rng(1)
    in_epoch = num_examples // BATCH
    for number in range(num_batches):
        if number % in_epoch == 0:
            ids = torch.from_numpy(generator.permutation(num_examples))
        yield ids[number % in_epoch * BATCH :][:BATCH]


def _compute_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _compute_penalty(model: nn.Module) -> Tensor:
    weights = [p for p in model.parameters() if p.dim() > 1]
    return PENALTY / 2 * torch.stack([w.square().sum() for w in weights]).sum()


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
