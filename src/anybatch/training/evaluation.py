"""The objective and its metrics over a whole data set, without an update.

L = R(v_1 .. v_N) + Omega,    v_i in evaluation mode, without a graph
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anybatch import batch as pytrees
from anybatch import penalties
from anybatch.batch import Uncollated
from anybatch.errors import DataError
from anybatch.gradient.result import joined, mean_metrics
from anybatch.objective import Objective
from anybatch.training.batches import Collate, num_examples, reader

__all__ = ["Evaluation", "evaluate", "outputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model is worth on some data."""

    loss: float  # R + Omega over all examples
    parts: Mapping[str, float]  # each term and penalty by name
    metrics: Mapping[str, float]  # each over the examples: sum over sum of counts
    num_examples: int


def evaluate(
    model: nn.Module,
    objective: Objective,
    data: Any,
    *,
    micro_batch: int = 256,
    collate: Collate | None = None,
) -> Evaluation:
    """Reduce the example losses of a whole data set as if it were one batch.

    The model is put in evaluation mode and left as it was; nothing else changes.

    Args:
        model: its parameters on one device.
        objective: as in training; the penalty is included, and a part of its own.
        data: as for `batches`.
        micro_batch: examples that pass through the model together.
        collate: examples to a batch; None: torch's `default_collate`.

    Raises:
        DataError: no data.
    """

    def losses_of(examples: Any, size: int) -> Any:
        losses = objective.losses(model, examples, size)
        return {name: term.map(torch.Tensor.cpu) for name, term in losses.items()}

    losses = joined(outputs(model, losses_of, data, micro_batch=micro_batch, collate=collate))
    parts = {name: float(r.value) for name, r in objective.reduce(losses).items()}
    parts |= {name: float(v) for name, v in penalties.values(objective.penalty, model).items()}
    return Evaluation(
        loss=sum(parts.values()),
        parts=parts,
        metrics={name: float(value) for name, value in mean_metrics(losses).items()},
        num_examples=num_examples(data),
    )


def outputs(
    model: nn.Module,
    function: Callable[[Any, int], Any],
    data: Any,
    *,
    micro_batch: int = 256,
    collate: Collate | None = None,
) -> list[Any]:
    """`function(examples, size)` for consecutive micro-batches, in evaluation mode, in order."""
    total = num_examples(data)
    if total == 0:
        raise DataError("expected data to evaluate on, got an empty data set.")
    read = reader(data, raw=collate is not None)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            results = []
            for start in range(0, total, micro_batch):
                ids = torch.arange(start, min(start + micro_batch, total))
                examples = read(ids)
                if collate is not None:
                    examples = Uncollated(examples, collate)
                results.append(function(pytrees.ready(examples, device), len(ids)))
            return results
    finally:
        for module, training in modes.items():
            module.training = training
