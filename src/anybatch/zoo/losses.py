"""Losses of one example each, with the metrics that go with them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.batch import ExampleLosses
from anybatch.errors import LossError

__all__ = ["cross_entropy", "sigmoid_cross_entropy", "squared_error"]


def cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Softmax cross-entropy, -log p of the target class; metric: accuracy.

    Args:
        model: inputs to logits [B, classes].
        batch: (inputs, targets), targets [B] of int64.
    """
    inputs, targets = batch
    logits = _logits("cross_entropy", model, inputs)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return ExampleLosses(losses, metrics={"accuracy": _hits(logits, targets)})


def sigmoid_cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum over the classes k of -y_k log s_k - (1 - y_k) log(1 - s_k); metric: accuracy.

    s = sigmoid(logits), each class a yes-or-no question of its own; y is 1 for the target class
    and 0 for the others. Computed from the logits, so that no s rounds to 0 or 1.

    Args:
        model: inputs to logits [B, classes], the last sigmoid left out.
        batch: (inputs, targets), targets [B] of int64.

    Source: Ng, Machine Learning (Coursera), exercise 4, 1.3: the summand of the cost J.
    """
    inputs, targets = batch
    logits = _logits("sigmoid_cross_entropy", model, inputs)
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        raise LossError(
            f"sigmoid_cross_entropy expects integer classes of shape (batch,), got "
            f"{targets.dtype} of shape {tuple(targets.shape)}. Are they one-hot already? Pass "
            f"targets.argmax(1)."
        )
    onehot = F.one_hot(targets.long(), logits.shape[1]).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    return ExampleLosses(terms.sum(1), metrics={"accuracy": _hits(logits, targets)})


def squared_error(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum over the outputs of (prediction - target)^2.

    Args:
        model: inputs to predictions [B, ...].
        batch: (inputs, targets), targets shaped like the predictions.
    """
    inputs, targets = batch
    predictions = model(inputs)
    if predictions.shape != targets.shape:
        raise LossError(
            f"squared_error expects targets shaped like the predictions "
            f"{tuple(predictions.shape)}, got {tuple(targets.shape)}."
        )
    return ExampleLosses((predictions - targets).square().flatten(1).sum(1))


def _logits(loss: str, model: nn.Module, inputs: Any) -> Tensor:
    logits: Tensor = model(inputs)
    if logits.ndim != 2:
        raise LossError(
            f"{loss} expects logits of shape (batch, classes), got {tuple(logits.shape)}."
        )
    return logits


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's, else 0: [B]."""
    return (logits.detach().argmax(1) == targets).to(logits.dtype)
