"""The training loop as a generator: the for-loop stays the caller's.

for each step t:   G = batch_gradient(batch t);   w <- optimizer(w, G);   yield

On several ranks all are at the same step, and each makes the same update of all shares' gradient.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from anybatch import distributed
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import DivergenceError, ModelError, OrderError, RunError
from anybatch.gradient import ClipExamples, ClipNorm, Gradient, batch_gradient
from anybatch.gradient.arguments import check_arguments
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.precision import Precision, check_precision
from anybatch.schedules import Schedule
from anybatch.training.agreement import Agreement, HasLeftError
from anybatch.training.batches import Batch, Collate, Transform, batches
from anybatch.training.checkpoints import Checkpoint
from anybatch.training.counts import CountWatch
from anybatch.training.data_fingerprint import DATA, data_fingerprint
from anybatch.training.environment import arithmetic, deterministic
from anybatch.training.optimizers import check_optimizer, set_rates
from anybatch.training.outside import OutsideModules
from anybatch.training.padding import watch_padding
from anybatch.training.precision import LossScale
from anybatch.training.run import Run
from anybatch.training.settings import ENVIRONMENT, check_alike, settings_of
from anybatch.training.sharded import ShardedOptimizer, check_elementwise
from anybatch.training.shares import share_of
from anybatch.training.state import TrainingState

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
    is_skipped: bool  # the gradient was not finite: weights, buffers and states are as before
    seconds: float  # from fetching the batch to the end of the update
    ends_epoch: bool  # whether the next update belongs to another epoch, or is none
    gradient: Gradient
    save: Callable[[], Checkpoint | None]
    """Checkpoint now, out of turn: the last thing the body does, on every rank. None on a rank that
    does not write."""


@check_arguments
def steps(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    data: Any,
    *,
    order: OrderProtocol,
    epochs: int,
    layout: Layout | None = None,
    observe: Observe | None = None,
    clip: ClipNorm | ClipExamples | None = None,
    collate: Collate | None = None,
    transform: Transform | None = None,
    schedule: Schedule | None = None,
    precision: Precision = "float32",
    workers: int = 0,
    state: Mapping[str, Any] | None = None,
    run: Run | str | Path | None = None,
    group: ProcessGroup | None = None,
    bitwise: bool = False,
    compare_every: int | None = None,
    shard: bool = False,
    self_check: bool = True,
) -> Iterator[Step]:
    """Train, an update an iteration.

    On several ranks each calls it with the same arguments and goes through the same loop. Each
    reads its share of a batch alone; losses and weights are the same on all.

    Args:
        model: in the mode (train, eval) that the caller has put it in.
        objective: what to minimise.
        optimizer: any of torch's whose `step()` takes no closure, over the model's parameters.
        data: what the order's indices point into; see `batches`.
        order: which examples make up each batch.
        epochs: how often to go through the data in all, those before a resume included; a run
            that has made them all, or more, makes no further update.
        layout, observe, clip: see `batch_gradient`; with a run, what is observed is kept with it.
        collate, transform: see `batches`.
        schedule: examples used so far to the learning rate of the optimiser's default; parameter
            groups with a rate of their own keep their proportion to it.
        precision: "bfloat16" or "float16": by autocast, in every forward pass; float16 with a loss
            scale, which is found by trial and kept in checkpoints.
        workers: processes that read batches ahead; see `batches`.
        state: the user's objects to be kept in checkpoints, by name, and restored in place: those
            with `state_dict()` and `load_state_dict()`, generators of random numbers, tensors, and
            dicts and lists of such objects and of numbers. A number alone is refused: no variable
            of the loop could be given its value again.
        run: a folder (or `Run`) for records and checkpoints; a run that is there is continued.
            A step is checkpointed once the body of the loop has finished with it. Of several
            ranks the first writes, and all read.
        group: the ranks that train together; None: this process alone. Any number of them
            continues a run that any other number has begun.
        bitwise: the same bits of weights and all other state for any number of ranks and through
            any resume, see `batch_gradient`; a run goes on only where they can be the same, or
            where `Run(accept_environment=True)` says otherwise. Only kernels that repeat their
            bits are used.
        compare_every: updates between comparisons of all that the ranks hold, by its SHA-256;
            None: before each checkpoint alone, where it is compared in any case.
        shard: keep the optimiser's state in parts on the ranks, see `ShardedOptimizer`; it is taken
            from the optimiser, and checkpoints hold the whole. Bits stay the same.
        self_check: compare a few examples, cut and uncut, at the 1st, 10th, 100th, ... update, see
            `batch_gradient`; where it is off, the records of the run say so.

    Yields:
        Each update, once it has been made.

    Raises:
        DivergenceError: a loss that is not finite, before anything is changed; ModelError: an
            optimiser that does not fit, or with bitwise an operation that does not repeat its
            bits; RunError: ranks that do not hold the same; and all that `batch_gradient`,
            `batches` and `Run` raise, on every rank if on one. RankError: another rank is gone.
    """
    total = _num_steps(order, epochs)
    check_optimizer(optimizer, model, schedule)
    check_precision(precision)
    training = TrainingState(model, optimizer, state or {}, loss_scale=LossScale(precision))
    reading: dict[str, Any] = {"collate": collate, "transform": transform}
    how: dict[str, Any] = {"observe": observe, "clip": clip}
    how |= {"precision": precision, "bitwise": bitwise}
    settings = settings_of(model, objective, optimizer, order, schedule=schedule, **how, **reading)
    agreement = Agreement(training, group, every=compare_every, bitwise=bitwise)
    run = _opened(run, group)
    how |= {"self_check": "run" if self_check and run is not None else self_check}
    outside = OutsideModules(model, objective, state or {})
    watches = outside, CountWatch(objective)
    loop = _Loop(training, objective, order, schedule, how, run, total, agreement, *watches)
    yield from _train(loop, settings, data, reading | {"workers": workers}, layout, shard=shard)


def _train(
    loop: "_Loop",
    settings: dict[str, Any],
    data: Any,
    reading: Mapping[str, Any],
    layout: Layout | None,
    *,
    shard: bool,
) -> Iterator[Step]:
    """Open everything that a loop needs, go through it, and close everything."""
    model, objective, run, group = loop.training.model, loop.objective, loop.run, loop.group
    with distributed.watch_thread(group), ExitStack() as stack:
        stack.enter_context(nullcontext() if run is None else closing(run))
        if run is not None:
            settings = settings | {DATA: _fingerprint(run, data, reading["workers"], group)}
        loop.begin(settings, shard=shard)
        share = share_of(model, objective, group, bitwise=loop.how["bitwise"])
        begun, total = loop.training.num_updates, loop.total
        read = batches(data, loop.order, begun, stop=total, share=share, **reading)
        stack.callback(read.close)
        checked = watch_padding(read, model, objective, reading["collate"])
        yield from loop.through(checked, layout)


@dataclass(frozen=True, slots=True)
class _Loop:
    """What stays from update to update."""

    training: TrainingState
    objective: Objective
    order: OrderProtocol
    schedule: Schedule | None
    how: Mapping[str, Any]  # further arguments of `batch_gradient`
    run: Run | None
    total: int
    agreement: Agreement
    outside: OutsideModules
    counts: CountWatch

    @property
    def group(self) -> ProcessGroup | None:
        return self.agreement.group

    def begin(self, settings: dict[str, Any], *, shard: bool) -> None:
        """Take up the run, and see that all ranks begin alike."""
        model, optimizer = self.training.model, self.training.optimizer
        if self.how["bitwise"]:
            found = distributed.call_together(partial(arithmetic, model), self.group)
            settings = settings | {ENVIRONMENT: found}
        if self.run is not None:
            distributed.call_together(self.training.check, self.group)
            keeps = self.how["observe"] is not None
            notes = {} if self.how["self_check"] else {"self_check": False}
            self.run.begin(self.training, settings, keep_ledger=keeps, notes=notes)
        check_alike(model, settings, self.group)
        self.agreement.begin()
        if not isinstance(optimizer, Optimizer):
            return
        if any(map(fsdp.is_sharded, model.parameters())):
            _check_slices(optimizer, self.group, shard=shard, bitwise=self.how["bitwise"])
        elif shard and self.group is not None:
            self.training.optimizer = ShardedOptimizer(optimizer, self.group)

    def through(self, read: Iterator[Batch], layout: Layout | None) -> Iterator[Step]:
        """An update for each batch, recorded before the loop's body sees it, and saved after."""
        run, layout, begun = self.run, layout or Layout(), time.perf_counter()
        while (
            batch := distributed.call_together(lambda: next(read, None), self.group)
        ) is not None:
            with self.exactly():
                gradient = self.gradient(batch, layout)
            if layout.micro_batch == "auto":
                layout = replace(layout, at_most=gradient.micro_batch)
            self.counts.note(gradient)
            if run is not None:
                run.note(batch.step, batch.epoch, gradient)
            try:
                with distributed.raise_together(self.group):
                    with self.exactly():
                        step = self.update(batch, gradient, begun)
                    if run is not None:
                        run.record(_row(step))
                        self.training.body.enter()
                    yield from self.agreement.handed(step)
                    if run is not None:
                        self.training.body.leave()
            except HasLeftError:
                return
            if run is not None and _is_due(step, run.checkpoint_every, self.total):
                self.outside.check()
                state = self.agreement.check(run.saved)
                distributed.call_together(partial(run.checkpoint, self.training, state), self.group)
            elif self.agreement.is_due():
                self.agreement.check(None if run is None else run.saved)
            begun = time.perf_counter()

    def exactly(self) -> AbstractContextManager[None]:
        """How arithmetic is to be done."""
        return deterministic() if self.how["bitwise"] else nullcontext()

    def gradient(self, batch: Batch, layout: Layout) -> Gradient:
        """That of one update, from all shares."""
        training = self.training
        compute = getattr(batch_gradient, "__wrapped__", batch_gradient)  # checked by `steps`
        gradient: Gradient = compute(
            training.model,
            self.objective,
            batch.examples,
            key=batch.key,
            layout=layout,
            ids=batch.ids,
            reduction_state=training.reduction,
            loss_scale=training.loss_scale.value,
            group=self.group,
            **self.how,
        )
        return gradient

    def update(self, batch: Batch, gradient: Gradient, begun: float) -> Step:
        """Make one update."""
        training, t = self.training, batch.step
        before = self.order.examples_before(t)
        loss = _finite_loss(gradient, t)
        if self.schedule is not None:
            set_rates(training.optimizer, self.schedule(before))
        training.loss_scale.note(is_finite=gradient.is_finite, step=t)
        if gradient.is_finite:
            training.optimizer.step()
            training.reduction = gradient.reduction_state
        training.num_updates = t + 1
        return Step(
            step=t,
            epoch=batch.epoch,
            examples=before + gradient.num_examples,
            loss=loss,
            parts={name: part.item() for name, part in gradient.parts.items()},
            metrics={name: metric.item() for name, metric in gradient.metrics.items()},
            lr=float(training.optimizer.param_groups[0]["lr"]),
            is_skipped=not gradient.is_finite,
            seconds=time.perf_counter() - begun,
            ends_epoch=t + 1 == self.total or self.order.epoch(t + 1) != batch.epoch,
            gradient=gradient,
            save=partial(self.save, t + 1),
        )

    def save(self, num_updates: int) -> Checkpoint | None:
        """Checkpoint the state after so many updates, which must be the present one, on all."""
        if self.run is None:
            raise RunError(
                "step.save() has nowhere to write, expected steps(..., run='runs/name')."
            )
        if num_updates != self.training.num_updates:
            raise RunError(
                f"step {num_updates - 1} cannot be saved any more, expected step.save() in the "
                f"body of the loop: the weights are those after {self.training.num_updates} "
                f"updates by now."
            )
        self.outside.check()
        self.training.body.leave()
        return self.run.checkpoint(self.training, self.agreement.check(self.run.saved))


def _fingerprint(
    run: Run, data: Any, workers: int, group: ProcessGroup | None
) -> Mapping[str, Any]:
    """Compute the fingerprint of the data, unless the run has that of a recipe's."""
    if run.data is not None:
        return run.data
    return distributed.call_together(lambda: data_fingerprint(data, workers=workers), group)


def _check_slices(
    optimizer: Optimizer, group: ProcessGroup | None, *, shard: bool, bitwise: bool
) -> None:
    """Refuse what an optimiser of a model in shards cannot do."""
    if shard:
        raise ModelError(
            "shard=True with a model in shards (fully_shard), whose optimiser holds no more than "
            "the state of its slices, expected one of the two. Leave shard out."
        )
    if bitwise:
        distributed.call_together(lambda: check_elementwise(optimizer), group)


def _opened(run: Run | str | Path | None, group: ProcessGroup | None) -> Run | None:
    if isinstance(run, str | Path):
        return Run(run, group=group)
    if not isinstance(run, Run | None):
        raise RunError(f"run is {run!r}. It must be a folder, ab.Run(folder) or None.")
    if run is not None and run.group is not group:
        raise RunError(
            f"the run is open for {distributed.get_num_ranks(run.group)} ranks and steps() trains "
            f"on {distributed.get_num_ranks(group)}, expected the same ranks for both: give "
            f"Run(...) and steps(...) the same group=."
        )
    return run


def _num_steps(order: OrderProtocol, epochs: int) -> int:
    total = order.num_steps(epochs)
    if total < 1:
        raise OrderError(f"{epochs} epochs of this order make no update, expected at least one.")
    return total


def _finite_loss(gradient: Gradient, step: int) -> float:
    loss = gradient.loss.item()
    if not math.isfinite(loss):  # the terms are, or they would have been refused with their ids
        parts = {name: part.item() for name, part in gradient.parts.items()}
        raise DivergenceError(
            f"the loss of step {step} is {loss}, expected a finite number; its parts are {parts}. "
            f"A penalty that overflows means weights that have grown without end: lower the "
            f"learning rate."
        )
    return float(loss)


def _is_due(step: Step, every: int | None, total: int) -> bool:
    made = step.step + 1
    return made == total or (step.ends_epoch if every is None else made % every == 0)


def _row(step: Step) -> dict[str, Any]:
    row: dict[str, Any] = {
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
    return row | {"skipped": True} if step.is_skipped else row
