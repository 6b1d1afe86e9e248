"""The training loop as a generator: the for-loop stays the caller's.

for each step t:   G = batch_gradient(batch t);   w <- optimizer(w, G);   yield
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from anybatch.errors import OrderError, RunError
from anybatch.gradient import ClipNorm, Gradient, batch_gradient
from anybatch.layout import Layout
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.schedules import Schedule
from anybatch.training.batches import Batch, Collate, Transform, batches
from anybatch.training.checkpoints import Checkpoint
from anybatch.training.run import Run
from anybatch.training.settings import settings_of
from anybatch.training.state import Stateful, TrainingState

__all__ = ["Step", "steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update, after it has been made."""

    step: int  # its number, from 0
    epoch: int  # of its first example
    examples: int  # used so far, this update's included
    loss: float  # R + Omega before the update
    parts: Mapping[str, float]  # each term and penalty by name
    metrics: Mapping[str, float]  # over the batch, before the update
    lr: float  # of the first parameter group
    seconds: float  # from fetching the batch to the end of the update
    ends_epoch: bool  # whether the next update belongs to another epoch, or is none
    gradient: Gradient
    save: Callable[[], Checkpoint]  # checkpoint now, out of turn


def steps(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    data: Any,
    *,
    order: OrderProtocol,
    epochs: int,
    layout: Layout | None = None,
    clip: ClipNorm | None = None,
    collate: Collate | None = None,
    transform: Transform | None = None,
    schedule: Schedule | None = None,
    state: Mapping[str, Stateful] | None = None,
    run: Run | str | Path | None = None,
) -> Iterator[Step]:
    """Train, an update an iteration.

    Args:
        model: in the mode (train, eval) that the caller has put it in.
        objective: what to minimise.
        optimizer: any of torch's whose `step()` takes no closure.
        data: what the order's indices point into; see `batches`.
        order: which examples make up each batch.
        epochs: how often to go through the data in all, those before a resume included.
        layout, clip: see `batch_gradient`.
        collate, transform: see `batches`.
        schedule: examples used so far to the learning rate of the optimiser's default; parameter
            groups with a rate of their own keep their proportion to it.
        state: the user's objects to be carried in checkpoints, by name.
        run: a folder (or `Run`) for records and checkpoints; a run that is there is continued.
            A step is checkpointed once the body of the loop has finished with it.

    Yields:
        Each update, once it has been made.

    Raises:
        DivergenceError: a loss that is not finite, before anything is changed; and all that
            `batch_gradient`, `batches` and `Run` raise.
    """
    total = order.num_steps(epochs)
    if total < 1:
        raise OrderError(f"{epochs} epochs of this order make no update, expected at least one.")
    training = TrainingState(model, optimizer, state or {})
    run = Run(run) if isinstance(run, str | Path) else run
    start = 0
    if run is not None:
        start = run.begin(training, settings_of(model, objective, optimizer, order, clip, schedule))
    update = partial(_update, training, objective, order, clip, schedule, run, total)
    layout = layout or Layout()
    try:
        for batch in batches(data, order, start, stop=total, collate=collate, transform=transform):
            step = update(batch, layout)
            if layout.micro_batch == "auto":
                layout = replace(layout, at_most=step.gradient.micro_batch)
            if run is not None:
                run.record(_row(step))
            yield step
            if run is not None and _is_due(step, run.checkpoint_every, total):
                step.save()
    finally:
        if run is not None:
            run.close()


def _update(
    training: TrainingState,
    objective: Objective,
    order: OrderProtocol,
    clip: ClipNorm | None,
    schedule: Schedule | None,
    run: Run | None,
    total: int,
    batch: Batch,
    layout: Layout,
) -> Step:
    begun = time.perf_counter()
    t = batch.step
    if schedule is not None:
        _set_rates(training.optimizer, schedule(order.examples_before(t)))
    gradient = batch_gradient(
        training.model,
        objective,
        batch.examples,
        key=batch.key,
        layout=layout,
        clip=clip,
        ids=batch.ids,
        reduction_state=training.reduction,
    )
    training.optimizer.step()
    training.reduction = gradient.reduction_state
    return Step(
        step=t,
        epoch=batch.epoch,
        examples=order.examples_before(t + 1),
        loss=gradient.loss.item(),
        parts={name: part.item() for name, part in gradient.parts.items()},
        metrics={name: metric.item() for name, metric in gradient.metrics.items()},
        lr=training.optimizer.param_groups[0]["lr"],
        seconds=time.perf_counter() - begun,
        ends_epoch=t + 1 == total or order.epoch(t + 1) != batch.epoch,
        gradient=gradient,
        save=partial(_save, run, training, t + 1),
    )


def _save(run: Run | None, training: TrainingState, num_updates: int) -> Checkpoint:
    if run is None:
        raise RunError("step.save() has nowhere to write, expected steps(..., run='runs/name').")
    return run.checkpoint(num_updates, training)


def _is_due(step: Step, every: int | None, total: int) -> bool:
    made = step.step + 1
    return made == total or (step.ends_epoch if every is None else made % every == 0)


def _row(step: Step) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step.step,
        "epoch": step.epoch,
        "examples": step.examples,
        "loss": step.loss,
        "parts": dict(step.parts),
        "metrics": dict(step.metrics),
        "lr": step.lr,
        "seconds": round(step.seconds, 6),
    }


def _set_rates(optimizer: Optimizer, lr: float) -> None:
    """Set the optimiser's rate; groups with a rate of their own keep their proportion to it."""
    default = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        own = group.setdefault("initial_lr", group["lr"])
        group["lr"] = lr if own == default else lr * (own / default)
