"""Mini-batch gradient descent: the loop over batches.

    cut the data into batches
    for each batch:   w <- update(w, gradient of the batch at w)

There is one update a batch. The loop is a generator, so the caller decides when to stop.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from anybatch.reference.gradient import BatchGradient, Reduction, batch_gradient
from anybatch.reference.losses import Loss
from anybatch.reference.network import Network
from anybatch.reference.optimisers import Optimiser
from anybatch.reference.parameters import Array
from anybatch.reference.penalties import Penalty

__all__ = ["Batch", "Step", "cut", "measure_accuracy", "train"]

Batch: TypeAlias = tuple[Sequence[Array] | Array, Sequence[Any] | Array]
State = TypeVar("State")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update."""

    number: int  # from 0
    gradient: BatchGradient  # of the batch, at the parameters before the update
    network: Network  # with the parameters after it


def train(
    network: Network,
    loss: Loss,
    batches: Iterable[Batch],
    optimiser: Optimiser[State],
    *,
    reduction: Reduction = "mean",
    penalty: Penalty | None = None,
) -> Iterator[Step]:
    """Make one update for each batch, when the caller asks for it.

    Args:
        network: before the first update; not changed.
        loss: of one example.
        batches: pairs of inputs and targets, with any number of examples each.
        optimiser: starts with a new state.
        reduction: as in `batch_gradient`.
        penalty: as in `batch_gradient`.

    Returns:
        An iterator over the updates.

    Raises:
        FloatingPointError: if the loss of a batch is not finite.
    """
    state = optimiser.start(network.parameters)
    for number, (inputs, targets) in enumerate(batches):
        with np.errstate(over="ignore", invalid="ignore"):  # reported below
            gradient = batch_gradient(
                network, loss, inputs, targets, reduction=reduction, penalty=penalty
            )
            state, parameters = optimiser.update(state, gradient.gradients, network.parameters)
        if not np.isfinite(gradient.loss):
            raise FloatingPointError(
                f"The loss at update {number} is {gradient.loss}. The steps of {optimiser} may be "
                f"too large: use a smaller learning rate. Or look for numbers in this batch that "
                f"are not finite."
            )
        network = replace(network, parameters=parameters)
        yield Step(number=number, gradient=gradient, network=network)


def cut(
    inputs: Sequence[Array] | Array, targets: Sequence[Any] | Array, batch_size: int
) -> Iterator[Batch]:
    """Cut the data into batches, in their order; the last may be smaller.

    Args:
        inputs: one for each example.
        targets: one for each example.
        batch_size: examples in a batch.

    Returns:
        An iterator over the batches of one epoch.
    """
    for first in range(0, len(inputs), batch_size):
        yield inputs[first : first + batch_size], targets[first : first + batch_size]


def measure_accuracy(
    network: Network, inputs: Sequence[Array] | Array, classes: Sequence[int] | Array
) -> float:
    """Return the share of examples whose largest output is that of their class.

    Args:
        network: with one output for each class.
        inputs: one for each example.
        classes: that of each example.

    Returns:
        From 0 to 1.
    """
    outputs = [network.forward(np.asarray(x, dtype=np.float64))[0] for x in inputs]
    return float(np.mean([int(np.argmax(y)) == t for y, t in zip(outputs, classes, strict=True)]))
