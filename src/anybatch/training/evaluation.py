"""Evaluate the objective and its metrics on a whole data set, without an update.

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
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import DataError, LayoutError, ModelError
from anybatch.example_losses import ExampleLosses, concatenate_losses, sum_metrics
from anybatch.examples import count_examples, make_reader
from anybatch.gradient.arguments import check_arguments
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.survey import check_parameter
from anybatch.objective import Objective
from anybatch.precision import Precision, autocast, check_precision
from anybatch.pytree import Uncollated
from anybatch.randomness import preserve_generators, seed_generators
from anybatch.runs.state import find_device
from anybatch.training.batches import Collate, share_evenly
from anybatch.training.metrics import Metrics, compute_metrics, select_outputs

__all__ = ["Evaluation", "evaluate", "find_device", "map_micro_batches", "preserve_buffers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Loss and metrics of a model on a data set."""

    loss: float  # R + Omega over all examples
    parts: Mapping[str, float]  # each term and penalty by name
    metrics: Mapping[str, float]  # of the losses: sum over sum of counts, in float64; and others
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
    metrics: Metrics | None = None,
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Reduce the example losses of a whole data set as if it were one batch.

        >>> import torch
        >>> import anybatch as ab
        >>> model = torch.nn.Linear(3, 1)
        >>> def losses(model, batch):
        ...     return (model(batch[0])[:, 0] - batch[1]) ** 2
        >>> evaluation = ab.evaluate(model, ab.Objective(losses), (torch.rand(8, 3), torch.rand(8)))
        >>> evaluation.num_examples
        8

    The model is evaluated in evaluation mode. Modes, buffers and random generators are restored. A
    model that draws random numbers in evaluation mode draws the same at each evaluation.

    Args:
        model: its parameters are on one device.
        objective: as in training; the penalty is included, and has its own entry in `parts`.
        data: as for `batches`.
        micro_batch: examples that pass through the model together.
        collate: from a list of examples to a batch; None: torch's `default_collate`.
        precision: as in training.
        metrics: by name, objects with `reset`, `update(predictions, targets)` and `compute`, such
            as those of torchmetrics; or a `MetricCollection`. Each is computed once, on a copy,
            from the outputs "predictions" and "targets" of the losses of all examples with n_i > 0.
            These are kept in memory. Without them, no output is kept.
        group: the ranks that share the micro-batches. Each has all data, and the result is the
            same on each, whatever their number. None: this process alone.

    Raises:
        DataError: there are no data. LayoutError: micro_batch is below 1. LossError: a metric
            cannot be computed from the outputs, or has the name of a metric of the losses.
    """
    check_precision(precision)
    device = find_device(model)

    def compute_losses(examples: Any, size: int) -> Any:
        with autocast(precision, device):
            losses = objective.losses(model, examples, size)
        outputs = select_outputs(losses) if metrics else {}
        return {n: term.map(lambda t: t.detach().cpu()) for n, term in losses.items()}, outputs

    how: dict[str, Any] = {"micro_batch": micro_batch, "collate": collate, "group": group}
    pieces = map_micro_batches(model, compute_losses, data, **how)
    losses = concatenate_losses([losses for losses, _ in pieces])
    omega = penalties.compute_values(objective.penalty, model, whole=fsdp.gather_tensor)

    def reduce() -> Evaluation:
        parts = {name: float(r.value) for name, r in objective.reduce(losses).items()}
        parts |= {name: float(value) for name, value in omega.items()}
        figures = sum_metrics({name: _widen_metrics(term) for name, term in losses.items()})
        others = compute_metrics(metrics, [outputs for _, outputs in pieces], figures)
        return Evaluation(
            loss=sum(parts.values()),
            parts=parts,
            metrics={name: float(value) for name, value in figures.items()} | others,
            num_examples=count_examples(data),
        )

    return distributed.broadcast_from_first(
        reduce, group
    )  # other machines may round in another way


def map_micro_batches(
    model: nn.Module,
    function: Callable[[Any, int], Any],
    data: Any,
    *,
    micro_batch: int = 256,
    collate: Collate | None = None,
    group: ProcessGroup | None = None,
) -> list[Any]:
    """Compute `function(examples, size)` of consecutive micro-batches in evaluation mode, in order.

    The random generators are seeded for each micro-batch, so that ranks may share them.
    """
    total = count_examples(data)
    _check_arguments(model, total, micro_batch)
    read = make_reader(data, raw=collate is not None)
    device = find_device(model)

    @_build_graph_if_needed
    def compute(start: int) -> Any:
        seed_generators(start, device)
        ids = torch.arange(start, min(start + micro_batch, total))
        examples = read(ids)
        if collate is not None:
            examples = Uncollated(examples, collate)
        return function(pytree.prepare_batch(examples, device), len(ids))

    starts = range(0, total, micro_batch)
    share = starts[share_evenly(group)(len(starts))]
    units = fsdp.find_units(model)
    most = -(-len(starts) // distributed.get_num_ranks(group)) if units else 0
    # FSDP needs the same number of passes on all ranks. The results of these are dropped.
    padding = [0] * (most - len(share))
    run = fsdp.gather_through_model if units else distributed.all_gather_object
    # Tensors made in inference mode can never get a gradient, and a loss may need one.
    no_inference = torch.inference_mode(False)
    with _use_evaluation_mode(model), preserve_generators(device), no_inference, torch.no_grad():
        per_rank = run(lambda: [compute(i) for i in (*share, *padding)][: len(share)], group)
        for unit in units:
            unit.reshard()  # type: ignore[operator]
    return [result for results in per_rank for result in results]


def _check_arguments(model: nn.Module, total: int, micro_batch: object) -> None:
    if total == 0:
        raise DataError("The data set to evaluate on is empty. It must hold at least one example.")
    if not is_count(micro_batch):
        raise LayoutError(f"micro_batch is {micro_batch!r}. It must be a number of at least 1.")
    for name, p in model.named_parameters():
        check_parameter(name, p, trains=False)


def _build_graph_if_needed(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """Wrap a function so that it runs with a graph once it has failed without one.

    A graph takes memory that most losses do not need. Losses with a derivative need it, such as a
    gradient penalty or the residual of a differential equation.
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


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a model, such as running averages, at the end."""
    buffers = Buffers.of(model)
    try:
        yield
    finally:
        buffers.restore()


@contextmanager
def _use_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode, and restore modes, buffers and gradients."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        model.eval()
    except NotImplementedError as error:
        raise ModelError(
            f"The model cannot be put in evaluation mode: {error} Export it in the mode that it is "
            f"to be used in, and call it in a loop of your own; or evaluate the module itself."
        ) from error
    for p, _ in gradients:
        p.grad = None  # a backward pass in the loss would add to it
    try:
        with preserve_buffers(model):
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, training in modes.items():
            module.training = training


def _widen_metrics(losses: ExampleLosses) -> ExampleLosses:
    """Convert metrics and counts to float64, so that a proportion is exactly hits / N."""
    metrics = {name: metric.double() for name, metric in losses.metrics.items()}
    return replace(losses, counts=losses.weights.double(), metrics=metrics)
