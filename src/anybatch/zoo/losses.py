"""Losses of one example each, with the metrics that go with them."""

from typing import Any

import torch.nn.functional as F
from torch import nn

from anybatch.batch import ExampleLosses
from anybatch.errors import LossError

__all__ = ["cross_entropy", "squared_error"]


def cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Softmax cross-entropy, -log p of the target class; metric: accuracy.

    Args:
        model: inputs to logits [B, classes].
        batch: (inputs, targets), targets [B] of int64.
    """
    inputs, targets = batch
    logits = model(inputs)
    if logits.ndim != 2:
        raise LossError(
            f"cross_entropy expects logits of shape (batch, classes), got {tuple(logits.shape)}."
        )
    hits = (logits.detach().argmax(1) == targets).to(logits.dtype)
    return ExampleLosses(
        F.cross_entropy(logits, targets, reduction="none"), metrics={"accuracy": hits}
    )


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
