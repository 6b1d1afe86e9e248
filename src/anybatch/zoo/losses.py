"""Losses for each example, with their metrics.

A batch is (inputs, targets), or (inputs, targets, weights) with sample weights w [B], >= 0:

    v_i <- w_i v_i,    n_i <- w_i n_i,    so that Mean is sum w v / sum w n

Metrics are weighted in the same way. The model is called as `model(inputs)`, whatever the inputs
are: the model itself handles `Padded` ones.
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
    """Compute the softmax cross-entropy, -log p of the target class; metric: accuracy.

    Example:
        >>> import torch
        >>> batch = torch.zeros(2, 4), torch.tensor([0, 1])
        >>> cross_entropy(nn.Linear(4, 3), batch).values.shape
        torch.Size([2])

    Args:
        model: inputs to logits [B, classes].
        batch: (inputs, targets), targets [B] of int64; or with weights.
    """
    inputs, targets, weights = _unpack("cross_entropy", batch)
    logits = _compute_logits("cross_entropy", model, inputs)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return _apply_weights(losses, weights, accuracy=_find_hits(logits, targets))


def token_cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum -log p of the target over the example's n_i tokens; metric: accuracy.

    Tokens that `Padded` masks do not count, and tokens with target -100 do not either.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[1, 2, 0]])
        >>> token_cross_entropy(nn.Embedding(3, 3), (tokens, tokens)).counts
        tensor([3])

    Args:
        model: inputs to logits [B, T, classes].
        batch: (inputs, targets), inputs a tensor or `Padded`, targets [B, T] of int64; or with
            weights.

    Raises:
        LossError: logits or targets have other shapes.
    """
    inputs, targets, weights = _unpack("token_cross_entropy", batch)
    logits: Tensor = model(inputs)
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise LossError(
            f"token_cross_entropy got logits of shape {tuple(logits.shape)} and targets of shape "
            f"{tuple(targets.shape)}. Expected (batch, tokens, classes) and (batch, tokens). For "
            f"one class for each example use cross_entropy."
        )
    mask = targets != IGNORED
    if isinstance(inputs, Padded):
        mask = mask & inputs.mask
    targets = targets.where(mask, IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    hits = logits.detach().argmax(2) == targets  # never where it is -100
    return _apply_weights(
        losses.view_as(targets).sum(1), weights, counts=mask.sum(1), accuracy=hits.sum(1)
    )


def sigmoid_cross_entropy(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum -y_k log s_k - (1 - y_k) log(1 - s_k) over the classes k; metric: accuracy.

    s = sigmoid(logits): each class is a yes-or-no question. y is 1 for the target class and 0 for
    the others. The loss is computed from the logits, so that no s rounds to 0 or 1.

    Example:
        >>> import torch
        >>> batch = torch.zeros(2, 4), torch.tensor([0, 1])
        >>> sigmoid_cross_entropy(nn.Linear(4, 3), batch).values.shape
        torch.Size([2])

    Args:
        model: inputs to logits [B, classes], without the last sigmoid.
        batch: (inputs, targets), targets [B] of int64; or with weights.

    Source: Ng, Machine Learning (Coursera), exercise 4, 1.3: the summand of the cost J.
    """
    inputs, targets, weights = _unpack("sigmoid_cross_entropy", batch)
    logits = _compute_logits("sigmoid_cross_entropy", model, inputs)
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        raise LossError(
            f"sigmoid_cross_entropy got targets of {targets.dtype} and shape "
            f"{tuple(targets.shape)}. Expected integer classes of shape (batch,). Are they one-hot "
            f"already? Pass targets.argmax(1)."
        )
    onehot = F.one_hot(targets.long(), logits.shape[1]).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    return _apply_weights(terms.sum(1), weights, accuracy=_find_hits(logits, targets))


def squared_error(model: nn.Module, batch: Any) -> ExampleLosses:
    """Sum (prediction - target)^2 over the outputs.

    Example:
        >>> import torch
        >>> squared_error(nn.Identity(), (torch.ones(2, 3), torch.zeros(2, 3))).values
        tensor([3., 3.])

    Args:
        model: inputs to predictions [B, ...].
        batch: (inputs, targets), targets shaped like the predictions, or [B] if these are
            [B, 1]; or with weights.
    """
    inputs, targets, weights = _unpack("squared_error", batch)
    predictions = model(inputs)
    if predictions.ndim == 2 and predictions.shape == (*targets.shape, 1):
        predictions = predictions[:, 0]
    if predictions.shape != targets.shape:
        raise LossError(
            f"squared_error got predictions of shape {tuple(predictions.shape)} and targets of "
            f"shape {tuple(targets.shape)}. Expected equal shapes."
        )
    errors = (predictions - targets).square()
    return _apply_weights(errors.flatten(1).sum(1) if errors.ndim > 1 else errors, weights)


def _unpack(loss: str, batch: Any) -> tuple[Any, Tensor, Tensor | None]:
    """Unpack inputs, targets, and weights if there are any."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        kind = f"{len(batch)} things" if isinstance(batch, tuple | list) else type(batch).__name__
        raise LossError(
            f"{loss} got a batch of {kind}. Expected (inputs, targets) or (inputs, targets, "
            f"weights)."
        )
    inputs, targets, weights = (*batch, None)[:3]
    if weights is not None and weights.shape != targets.shape[:1]:
        raise LossError(
            f"{loss} got weights of shape {tuple(weights.shape)}. Expected one for each example: "
            f"{tuple(targets.shape[:1])}."
        )
    return inputs, targets, weights


def _apply_weights(
    values: Tensor, weights: Tensor | None, counts: Tensor | None = None, **metrics: Tensor
) -> ExampleLosses:
    """Multiply values, counts and metrics by the weight of each example."""
    if weights is None:
        return ExampleLosses(values, counts, metrics=metrics)
    w = weights.to(values.dtype)
    weighted = {name: w * metric for name, metric in metrics.items()}
    return ExampleLosses(w * values, w if counts is None else w * counts, metrics=weighted)


def _compute_logits(loss: str, model: nn.Module, inputs: Any) -> Tensor:
    logits: Tensor = model(inputs)
    if logits.ndim != 2:
        raise LossError(
            f"{loss} got logits of shape {tuple(logits.shape)}. Expected (batch, classes). For one "
            f"class for each token use token_cross_entropy."
        )
    return logits


def _find_hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where the largest logit is the target's, else 0: [B]."""
    return (logits.detach().argmax(1) == targets).to(logits.dtype)
