"""Losses of one example each, with the metrics that go with them.

A batch is (inputs, targets), or (inputs, targets, weights) with sample weights w [B], >= 0:

    v_i <- w_i v_i,    n_i <- w_i n_i,    so that Mean is sum w v / sum w n

Metrics are weighted alike. The model is called as `model(inputs)`, whatever inputs are: it is the
model that knows a `Padded` from a tensor.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.batch import Padded
from anybatch.errors import LossError
from anybatch.example_losses import ExampleLosses

__all__ = ["cross_entropy", "sigmoid_cross_entropy", "squared_error", "token_cross_entropy"]

IGNORED = -100  # the target of a token that does not count, as in torch


def cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Softmax cross-entropy, -log p of the target class; metric: accuracy.

    Args:
        model: inputs to logits [B, classes].
        batch: (inputs, targets), targets [B] of int64; or with weights.
    """
    inputs, targets, weights = _unpack("cross_entropy", batch)
    logits = _compute_logits("cross_entropy", model, inputs)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return _apply_weights(losses, weights, accuracy=_find_hits(logits, targets))


def token_cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum over the example's tokens of -log p of the target; n_i of them; metric: accuracy.

    Tokens that `Padded` masks do not count, nor do those of target -100.

    Args:
        model: inputs to logits [B, T, classes].
        batch: (inputs, targets), inputs a tensor or `Padded`, targets [B, T] of int64; or with
            weights.

    Raises:
        LossError: logits or targets of other shapes.
    """
    inputs, targets, weights = _unpack("token_cross_entropy", batch)
    logits: Tensor = model(inputs)
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise LossError(
            f"token_cross_entropy expects logits of shape (batch, tokens, classes) and targets of "
            f"shape (batch, tokens), got {tuple(logits.shape)} and {tuple(targets.shape)}. For a "
            f"class an example take cross_entropy."
        )
    counted = targets != IGNORED
    if isinstance(inputs, Padded):
        counted = counted & inputs.mask
    targets = targets.where(counted, IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    hits = logits.detach().argmax(2) == targets  # never where it is -100
    return _apply_weights(
        losses.view_as(targets).sum(1), weights, counts=counted.sum(1), accuracy=hits.sum(1)
    )


def sigmoid_cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum over the classes k of -y_k log s_k - (1 - y_k) log(1 - s_k); metric: accuracy.

    s = sigmoid(logits), each class a yes-or-no question of its own; y is 1 for the target class
    and 0 for the others. Computed from the logits, so that no s rounds to 0 or 1.

    Args:
        model: inputs to logits [B, classes], the last sigmoid left out.
        batch: (inputs, targets), targets [B] of int64; or with weights.

    Source: Ng, Machine Learning (Coursera), exercise 4, 1.3: the summand of the cost J.
    """
    inputs, targets, weights = _unpack("sigmoid_cross_entropy", batch)
    logits = _compute_logits("sigmoid_cross_entropy", model, inputs)
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        raise LossError(
            f"sigmoid_cross_entropy expects integer classes of shape (batch,), got "
            f"{targets.dtype} of shape {tuple(targets.shape)}. Are they one-hot already? Pass "
            f"targets.argmax(1)."
        )
    onehot = F.one_hot(targets.long(), logits.shape[1]).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    return _apply_weights(terms.sum(1), weights, accuracy=_find_hits(logits, targets))


def squared_error(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum over the outputs of (prediction - target)^2.

    Args:
        model: inputs to predictions [B, ...].
        batch: (inputs, targets), targets shaped like the predictions, or [B] where these are
            [B, 1]; or with weights.
    """
    inputs, targets, weights = _unpack("squared_error", batch)
    predictions = model(inputs)
    if predictions.ndim == 2 and predictions.shape == (*targets.shape, 1):
        predictions = predictions[:, 0]
    if predictions.shape != targets.shape:
        raise LossError(
            f"squared_error expects targets shaped like the predictions "
            f"{tuple(predictions.shape)}, got {tuple(targets.shape)}."
        )
    errors = (predictions - targets).square()
    return _apply_weights(errors.flatten(1).sum(1) if errors.ndim > 1 else errors, weights)


def _unpack(loss: str, batch: Any) -> tuple[Any, Tensor, Tensor | None]:
    """Inputs, targets, and weights if there are any."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        came = f"{len(batch)} things" if isinstance(batch, tuple | list) else type(batch).__name__
        raise LossError(
            f"{loss} expects a batch (inputs, targets) or (inputs, targets, weights), got {came}."
        )
    inputs, targets, weights = (*batch, None)[:3]
    if weights is not None and weights.shape != targets.shape[:1]:
        raise LossError(
            f"{loss} expects weights of shape {tuple(targets.shape[:1])}, one an example, got "
            f"{tuple(weights.shape)}."
        )
    return inputs, targets, weights


def _apply_weights(
    values: Tensor, weights: Tensor | None, counts: Tensor | None = None, **metrics: Tensor
) -> ExampleLosses:
    """Values, counts and metrics times the weight of each example."""
    if weights is None:
        return ExampleLosses(values, counts, metrics=metrics)
    w = weights.to(values.dtype)
    weighted = {name: w * metric for name, metric in metrics.items()}
    return ExampleLosses(w * values, w if counts is None else w * counts, metrics=weighted)


def _compute_logits(loss: str, model: nn.Module, inputs: Any) -> Tensor:
    logits: Tensor = model(inputs)
    if logits.ndim != 2:
        raise LossError(
            f"{loss} expects logits of shape (batch, classes), got {tuple(logits.shape)}. "
            f"For a class a token take token_cross_entropy."
        )
    return logits


def _find_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's, else 0: [B]."""
    return (logits.detach().argmax(1) == targets).to(logits.dtype)
