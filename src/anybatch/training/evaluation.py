"""The objective and its metrics over a whole data set, without an update.

L = R(v_1 .. v_N) + Omega,    v_i in evaluation mode, without a graph
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from anybatch import distributed, penalties, pytree
from anybatch.batch import is_count
from anybatch.distributed import ProcessGroup, shards
from anybatch.errors import DataError, LayoutError, ModelError
from anybatch.example_losses import ExampleLosses, concatenate_losses, sum_metrics
from anybatch.gradient.arguments import check_arguments
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.materialized import check_materialized
from anybatch.objective import Objective
from anybatch.precision import Precision, autocast, check_precision
from anybatch.pytree import Uncollated
from anybatch.randomness import preserve_generators, seed_generators
from anybatch.training.batches import Collate, num_examples, reader
from anybatch.training.shares import evenly

__all__ = ["Evaluation", "evaluate", "outputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model is worth on some data."""

    loss: float  # R + Omega over all examples
    parts: Mapping[str, float]  # each term and penalty by name
    metrics: Mapping[str, float]  # each over the examples: sum over sum of counts, in float64
    num_examples: int


@check_arguments
def evaluate(
    model: nn.Module,
    objective: Objective,
    data: Any,
    *,
    micro_batch: int = 256,
    collate: Collate | None = None,
    precision: Precision = "float32",
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Reduce the example losses of a whole data set as if it were one batch.

    The model is put in evaluation mode; modes, buffers and random generators are then as before.
    A model that draws even so draws the same at each evaluation.

    Args:
        model: its parameters on one device.
        objective: as in training; the penalty is included, and a part of its own.
        data: as for `batches`.
        micro_batch: examples that pass through the model together.
        collate: examples to a batch; None: torch's `default_collate`.
        precision: as in training.
        group: the ranks that share the micro-batches, each of which has all data; the result is
            the same for any, and the same on each. None: this process alone.

    Raises:
        DataError: no data; LayoutError: micro_batch below 1.
    """
    check_precision(precision)
    device = device_of(model)

    def losses_of(examples: Any, size: int) -> Any:
        with autocast(precision, device):
            losses = objective.losses(model, examples, size)
        return {name: term.map(lambda t: t.detach().cpu()) for name, term in losses.items()}

    how: dict[str, Any] = {"micro_batch": micro_batch, "collate": collate, "group": group}
    losses = concatenate_losses(outputs(model, losses_of, data, **how))
    omega = penalties.compute_values(objective.penalty, model, whole=shards.whole)

    def reduced() -> Evaluation:
        parts = {name: float(r.value) for name, r in objective.reduce(losses).items()}
        parts |= {name: float(value) for name, value in omega.items()}
        metrics = sum_metrics({name: _with_wide_metrics(term) for name, term in losses.items()})
        return Evaluation(
            loss=sum(parts.values()),
            parts=parts,
            metrics={name: float(value) for name, value in metrics.items()},
            num_examples=num_examples(data),
        )

    return distributed.of_first(reduced, group)  # other machines may round otherwise


def outputs(
    model: nn.Module,
    function: Callable[[Any, int], Any],
    data: Any,
    *,
    micro_batch: int = 256,
    collate: Collate | None = None,
    group: ProcessGroup | None = None,
) -> list[Any]:
    """`function(examples, size)` for consecutive micro-batches, in evaluation mode, in order.

    The random generators are seeded for each, so that ranks may share them.
    """
    total = num_examples(data)
    if total == 0:
        raise DataError("expected data to evaluate on, got an empty data set.")
    _check(model, micro_batch)
    read = reader(data, raw=collate is not None)
    device = device_of(model)

    @_with_graph_where_needed
    def result_of(start: int) -> Any:
        seed_generators(start, device)
        ids = torch.arange(start, min(start + micro_batch, total))
        examples = read(ids)
        if collate is not None:
            examples = Uncollated(examples, collate)
        return function(pytree.prepare_batch(examples, device), len(ids))

    starts = range(0, total, micro_batch)
    own = starts[evenly(group)(len(starts))]
    units = shards.units(model)
    most = -(-len(starts) // distributed.num_ranks(group)) if units else 0
    idle = [0] * (most - len(own))  # results for nobody, while other ranks go through the model
    together = shards.through_layers if units else distributed.everywhere
    outside = torch.inference_mode(False)  # in which nothing could be differentiated
    with _evaluating(model), preserve_generators(device), outside, torch.no_grad():
        told = together(lambda: [result_of(i) for i in (*own, *idle)][: len(own)], group)
        for unit in units:
            unit.reshard()  # type: ignore[operator]
    return [result for results in told for result in results]


def _check(model: nn.Module, micro_batch: object) -> None:
    if not is_count(micro_batch):
        raise LayoutError(f"expected a micro_batch of at least 1 example, got {micro_batch!r}.")
    for name, p in model.named_parameters():
        check_materialized(name, p, trains=False)


def _with_graph_where_needed(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """Wrap a function so that it runs with a graph once it has failed without one.

    A graph takes memory that most losses do not need. Those with a derivative in them do, such as
    a gradient penalty or the residual of a differential equation.
    """
    is_needed = False

    def run(start: int) -> Any:
        nonlocal is_needed
        if not is_needed:
            try:
                return function(start)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            is_needed = True
        with torch.enable_grad():
            return function(start)

    return run


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Enter evaluation mode; modes, buffers and gradients are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = Buffers.of(model)
    gradients = [(p, p.grad) for p in model.parameters()]
    _put_in_evaluation(model)
    for p, _ in gradients:
        p.grad = None  # a backward pass in the loss would add to it
    try:
        yield
    finally:
        buffers.restore()
        for p, gradient in gradients:
            p.grad = gradient
        for module, training in modes.items():
            module.training = training


def _put_in_evaluation(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError as error:
        raise ModelError(
            f"The model cannot be put in evaluation mode: {error} Export it in the mode that it is "
            f"to be used in, and call it in a loop of your own; or evaluate the module itself."
        ) from error


def _with_wide_metrics(losses: ExampleLosses) -> ExampleLosses:
    """Metrics and counts in float64, so that a proportion is hits / N to the last bit."""
    metrics = {name: metric.double() for name, metric in losses.metrics.items()}
    return replace(losses, counts=losses.weights.double(), metrics=metrics)
