"""Metrics of others, such as those of torchmetrics, over a whole data set.

    metric.update(predictions, targets);  metric.compute()

The predictions of all micro-batches and ranks are joined in the data's order first. So the metric
sees the same tensors for every layout, and never has to be averaged.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from anybatch.errors import LossError
from anybatch.example_losses import Losses, Outputs, concatenate_outputs, list_outputs

__all__ = ["Metric", "Metrics", "compute_metrics", "select_outputs"]

NAMES = ("predictions", "targets")


class Metric(Protocol):
    """An object like a `torchmetrics.Metric`."""

    def reset(self) -> Any:
        """Forget all predictions."""

    def update(self, predictions: Any, targets: Any) -> Any:
        """Add predictions and targets."""

    def compute(self) -> Any:
        """Compute the figure of all predictions so far."""


Metrics = Mapping[str, Metric] | nn.ModuleDict
"""Metrics by name; a `MetricCollection` of torchmetrics is a `ModuleDict`."""


def select_outputs(losses: Losses) -> Outputs:
    """Return predictions and targets of the examples that take part, on the CPU.

    Raises:
        LossError: the losses have no such outputs.
    """
    terms = [term for term in losses.values() if set(NAMES) <= set(term.outputs)]
    if len(terms) != 1:
        names = ", ".join(map(repr, list_outputs(losses))) or "none"
        raise LossError(
            f"{len(terms)} terms of the losses have the outputs 'predictions' and 'targets', which "
            f"metrics are computed from. One term must have both; the outputs are: {names}. Return "
            f"ab.ExampleLosses(values, outputs={{'predictions': ..., 'targets': ...}})."
        )
    outputs, present = terms[0].outputs, terms[0].present
    return {name: outputs[name].detach()[present.to(outputs[name].device)].cpu() for name in NAMES}


def compute_metrics(
    metrics: Metrics | None, outputs: Sequence[Outputs], figures: Collection[str]
) -> dict[str, float]:
    """Compute each metric of all predictions, on a copy, in this process alone.

    Args:
        metrics: by name.
        outputs: "predictions" and "targets" of consecutive micro-batches, in the data's order.
        figures: names that the metrics of the losses have.

    Raises:
        LossError: a metric refuses the predictions, computes more than one number, or has the name
            of another.
    """
    if not metrics:
        return {}
    by_name: dict[str, Any] = dict(metrics.items())
    for name in by_name:
        if name in figures:
            raise LossError(f"The losses have a metric {name!r} already. Rename one of the two.")
    whole = concatenate_outputs(outputs)
    return {name: _compute(name, metric, whole) for name, metric in by_name.items()}


def _compute(name: str, metric: Metric, whole: Outputs) -> float:
    predictions, targets = (whole[output] for output in NAMES)
    try:
        metric = _copy(metric)
        if isinstance(predictions, list) or isinstance(targets, list):  # of several shapes
            for row, target in zip(predictions, targets, strict=True):
                metric.update(row[None], target[None])
        else:
            metric.update(predictions, targets)
        value = metric.compute()
    except Exception as error:
        raise LossError(
            f"The metric {name!r} cannot be computed: {error} It got predictions "
            f"{_describe(predictions)} and targets {_describe(targets)}. Return outputs that fit."
        ) from error
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise LossError(
            f"The metric {name!r} computes a {type(value).__name__}{shape}. It must compute one "
            f"number. Choose an average, such as average='macro', or pass several metrics."
        ) from None


def _copy(metric: Metric) -> Metric:
    """Copy a metric without its predictions. The copy does not wait for other ranks."""
    metric = copy.deepcopy(metric)
    if isinstance(metric, nn.Module):
        metric.cpu()
        for part in metric.modules():  # torchmetrics, and the metrics that a metric wraps
            part.distributed_available_fn = lambda: False  # type: ignore[assignment]
    metric.reset()
    return metric


def _describe(output: Tensor | list[Tensor]) -> str:
    if isinstance(output, list):
        return f"of {len(output)} shapes"
    return f"{tuple(output.shape)} of {output.dtype}"
