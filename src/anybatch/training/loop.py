"""Train in a generator, so that the caller writes the for-loop.

for each step t:   G = batch_gradient(batch t);   w <- optimizer(w, G);   yield

All ranks are at the same step, and make the same update from the gradient of all shares.
"""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anybatch import distributed
from anybatch.batch import Pad
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import RunError
from anybatch.gradient import ClipExamples, ClipNorm, Gradient, batch_gradient
from anybatch.gradient.arguments import check_arguments
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.optim.loss_scale import LossScale
from anybatch.optim.rates import follow_schedule
from anybatch.optim.zero import ShardedOptimizer
from anybatch.order import OrderProtocol
from anybatch.precision import Precision
from anybatch.runs.body import OutsideModules
from anybatch.runs.checkpoints import Checkpoint
from anybatch.runs.data_fingerprint import DATA, compute_fingerprint
from anybatch.runs.environment import describe_arithmetic, use_deterministic_kernels
from anybatch.runs.rank_check import OtherRankLeftError, RankCheck
from anybatch.runs.run import Run
from anybatch.runs.settings import ENVIRONMENT, collect_settings, compare_ranks
from anybatch.runs.state import TrainingState
from anybatch.schedules import Schedule
from anybatch.training.batches import Batch, Collate, Transform, batches, choose_share
from anybatch.training.checks import (
    check_fsdp,
    check_loss,
    check_step,
    count_updates,
    open_run,
    prepare_scheduler,
)
from anybatch.training.compiled_updates import Compile, CompiledUpdates, prepare_compiled
from anybatch.training.data_checks import CountWatch, watch_padding
from anybatch.training.spike_finder import SpikeFinder, prepare_finder
from anybatch.training.spikes import Spike, SpikeWatch
from anybatch.training.step import Step, is_due
from anybatch.training.updates import Updates

__all__ = ["Step", "steps"]


@check_arguments
def steps(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    data: Any,
    *,
    order: OrderProtocol,
    epochs: int | None = None,
    steps: int | None = None,
    layout: Layout | None = None,
    observe: Observe | None = None,
    clip: ClipNorm | ClipExamples | None = None,
    collate: Collate | None = None,
    transform: Transform | None = None,
    schedule: Schedule | LRScheduler | None = None,
    precision: Precision = "float32",
    workers: int = 0,
    state: Mapping[str, Any] | None = None,
    run: Run | str | Path | None = None,
    group: ProcessGroup | None = None,
    bitwise: bool = False,
    compare_every: int | None = None,
    spikes: SpikeWatch | None = None,
    shard: bool = False,
    self_check: bool = True,
    compile: Compile = False,
) -> Updates:
    """Train a model, one update per iteration.

        >>> import torch
        >>> import anybatch as ab
        >>> model = torch.nn.Linear(3, 1)
        >>> def losses(model, batch):
        ...     return (model(batch[0])[:, 0] - batch[1]) ** 2
        >>> data = torch.rand(8, 3), torch.rand(8)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> order = ab.Order(8, batch_size=4, seed=0)
        >>> for step in ab.steps(model, ab.Objective(losses), sgd, data, order=order, epochs=2):
        ...     if step.ends_epoch:
        ...         print(f"epoch {step.epoch}: {step.examples} examples so far")
        epoch 0: 8 examples so far
        epoch 1: 16 examples so far

    All ranks call it with the same arguments and run the same loop. Each reads only its share of a
    batch; losses and weights are the same on all.

    Args:
        model: in the mode (train, eval) that the caller has chosen.
        objective: what to minimise.
        optimizer: any of torch's over the model's parameters. One whose `step` needs a closure,
            such as LBFGS or SAM, evaluates the same batch again.
        data: examples by index; see `batches`.
        order: which examples make up each batch.
        epochs: number of passes over the data, those before a resume included. A run that has made
            them all makes no further update.
        steps: number of updates, in place of epochs.
        layout, observe, clip: see `batch_gradient`; a run saves what is observed.
        collate, transform: see `batches`.
        schedule: from the number of examples used so far to the optimiser's default learning rate;
            parameter groups with another rate keep their proportion to it. Or a scheduler of torch,
            which takes a step after each update and is saved with the run.
        precision: "bfloat16" or "float16": by autocast, in every forward pass. float16 uses a loss
            scale, which is found by trial and saved in checkpoints.
        workers: processes that read batches ahead; see `batches`.
        state: the user's objects to save in checkpoints, by name, and to restore in place: those
            with `state_dict()` and `load_state_dict()`, generators of random numbers, tensors, and
            dicts and lists of such objects and of numbers. A bare number is refused: no variable
            of the loop could be given its value again.
        run: a folder (or `Run`) for records and checkpoints; an existing run is continued. A step
            is checkpointed after the body of the loop. Only the first rank writes; all ranks read.
        group: the ranks that train together; None: this process alone. A run may continue on
            another number of ranks.
        bitwise: the same bits of weights and all other state for any number of ranks and through
            any resume, see `batch_gradient`. A run continues only where its bits can be the same,
            or where `Run(accept_environment=True)` allows others. Only kernels that repeat their
            bits are used.
        compare_every: updates between comparisons of the state of all ranks, by its SHA-256; None:
            only before each checkpoint.
        spikes: watch for a spike of the loss or of the gradient's norm, and name the examples
            behind it: `step.spike`, and a row of the run's records. No bit of the training changes.
        shard: shard the optimiser's state over the ranks, see `ShardedOptimizer`. The state is
            taken from the optimiser, and checkpoints hold the whole. The bits stay the same.
        self_check: compare a few examples, cut and uncut, at the 1st, 10th, 100th, ... update, see
            `batch_gradient`; the records of a run say if it is off.
        compile: True: the whole update as one function of `torch.compile`, equal to rounding, or
            a refusal. "auto": only where it is measured to be faster, see `compiled_updates`.

    Returns:
        An iterator over the updates, each after it was made; `len` counts those that are left.

    Raises:
        DivergenceError: a loss is not finite; nothing is changed by its update. ModelError: the
            optimiser does not fit, or with bitwise an operation does not repeat its bits.
            RunError: the ranks hold different states. RankError: another rank is gone. And all
            errors of `batch_gradient`, `batches` and `Run`. An error on one rank is raised on all.
    """
    total = count_updates(order, epochs, steps)
    check_step(optimizer, model, schedule, precision, shard=shard)
    objects, rate = prepare_scheduler(schedule, optimizer, state, shard=shard)
    training = TrainingState(model, optimizer, objects, loss_scale=LossScale(precision))
    reading: dict[str, Any] = {"collate": collate, "transform": transform}
    how = dict[str, Any](observe=observe, clip=clip, precision=precision, bitwise=bitwise)
    settings = collect_settings(model, objective, optimizer, order, schedule=rate, **how, **reading)
    rank_check = RankCheck(training, group, every=compare_every, bitwise=bitwise)
    finder, run = prepare_finder(spikes, training), open_run(run, group)
    how |= {"self_check": "run" if self_check and run is not None else self_check}
    watches = OutsideModules(model, objective, objects), CountWatch(objective), finder
    loop = _Loop(training, objective, order, schedule, how, run, total, rank_check, *watches)
    return loop.start(compile, settings, data, reading, layout, workers=workers, shard=shard)


_batch_gradient = getattr(batch_gradient, "__wrapped__", batch_gradient)  # `steps` has checked


@dataclass(frozen=True, slots=True)
class _Loop:
    """Everything that stays the same from update to update."""

    training: TrainingState
    objective: Objective
    order: OrderProtocol
    schedule: Schedule | LRScheduler | None
    how: Mapping[str, Any]  # further arguments of `batch_gradient`
    run: Run | None
    total: int  # number of updates
    rank_check: RankCheck
    outside: OutsideModules
    counts: CountWatch
    finder: SpikeFinder | None
    compiled: CompiledUpdates | None = None

    @property
    def group(self) -> ProcessGroup | None:
        return self.rank_check.group

    def start(self, compile: Compile, settings: dict[str, Any], *args: Any, **how: Any) -> Updates:
        """Return the iterator over the updates; see `run_steps` for the arguments."""
        loop = self
        if compile is not False:
            loop = replace(self, compiled=prepare_compiled(compile, self, settings, args[2]))
        return Updates(loop.run_steps(settings, *args, **how), loop.count_left, loop.close)

    def run_steps(
        self,
        settings: dict[str, Any],
        data: Any,
        reading: Mapping[str, Any],
        layout: Layout | None,
        *,
        workers: int,
        shard: bool,
    ) -> Generator[Step]:
        """Open everything that the loop needs, make all updates, and close everything."""
        model, objective, collate = self.training.model, self.objective, reading["collate"]
        with distributed.watch_thread(self.group), ExitStack() as stack:
            if self.run is not None:
                stack.enter_context(closing(self.run))
                fingerprint = self.get_fingerprint(self.run, data, workers)
                settings = settings | {DATA: fingerprint}
            self.begin(settings, shard=shard)
            share = choose_share(model, objective, self.group, bitwise=self.how["bitwise"])
            first = self.training.num_updates
            how = {**reading, "share": share, "workers": workers}
            source: Iterator[Batch] = stack.enter_context(
                closing(batches(data, self.order, first, stop=self.total, **how))
            )
            if isinstance(collate, Pad):
                source = watch_padding(source, model, objective, collate)
            yield from self.make_updates(source, layout or Layout())

    def count_left(self) -> int:
        """Count the updates after the present state, or after the checkpoint to be loaded."""
        done = self.training.num_updates
        if not done and self.run is not None:
            done = self.run.count_updates()
        return max(self.total - done, 0)

    def close(self) -> None:
        """Close the run, which is open from the beginning."""
        if self.run is not None:
            self.run.close()

    def get_fingerprint(self, run: Run, data: Any, workers: int) -> Mapping[str, Any]:
        """Return the fingerprint of the data, computed unless a recipe has given one."""
        if run.data is not None:
            return run.data
        compute = partial(compute_fingerprint, data, workers=workers)
        return distributed.call_together(compute, self.group)

    def begin(self, settings: dict[str, Any], *, shard: bool) -> None:
        """Open or resume the run, and check that all ranks begin with the same state."""
        model, optimizer = self.training.model, self.training.optimizer
        if self.how["bitwise"]:
            facts = distributed.call_together(partial(describe_arithmetic, model), self.group)
            settings = settings | {ENVIRONMENT: facts}
        if self.run is not None:
            distributed.call_together(self.training.check, self.group)
            has_ledger = self.how["observe"] is not None
            notes = {} if self.how["self_check"] else {"self_check": False}
            self.run.begin(self.training, settings, has_ledger=has_ledger, notes=notes)
        compare_ranks(model, settings, self.group)
        self.rank_check.begin()
        if not isinstance(optimizer, Optimizer):
            return
        if any(map(fsdp.is_sharded, model.parameters())):
            check_fsdp(optimizer, self.group, shard=shard, bitwise=self.how["bitwise"])
        elif shard and self.group is not None:
            self.training.optimizer = ShardedOptimizer(optimizer, self.group)

    def make_updates(self, source: Iterator[Batch], layout: Layout) -> Iterator[Step]:
        """Make an update for each batch: record it, pass it to the loop's body, checkpoint it."""
        run, group, start = self.run, self.group, time.perf_counter()
        kernels = use_deterministic_kernels if self.how["bitwise"] else nullcontext
        while (batch := self.read(source)) is not None:
            with kernels():
                gradient, spike = self.compute_and_inspect(batch, layout)
            if layout.micro_batch == "auto":
                layout = replace(layout, at_most=gradient.micro_batch)
            if not self.counts.is_done:
                self.counts.note(gradient)
            if run is not None:
                run.add_to_ledger(batch.step, batch.epoch, gradient)
            try:
                with nullcontext() if group is None else distributed.raise_together(group):
                    with kernels():
                        step = self.update(batch, gradient, layout, start, spike)
                    if run is not None:
                        step.record_in(run)
                        self.training.body.enter()
                    if group is None:
                        yield step
                    else:
                        yield from self.rank_check.pass_to_body(step)
                    if run is not None:
                        self.training.body.leave()
            except OtherRankLeftError:
                return
            if run is not None and is_due(step, run.checkpoint_every, self.total):
                self.outside.check()
                state = self.rank_check.check(run.saved)
                distributed.call_together(
                    partial(run.write_checkpoint, self.training, state), group
                )
            elif group is not None and self.rank_check.is_due():
                self.rank_check.check(None if run is None else run.saved)
            start = time.perf_counter()

    def read(self, source: Iterator[Batch]) -> Batch | None:
        """Read the next batch on all ranks; None at the end."""
        if self.rank_check.group is None:
            return next(source, None)
        return distributed.call_together(lambda: next(source, None), self.group)

    def compute_and_inspect(self, batch: Batch, layout: Layout) -> tuple[Gradient, Spike | None]:
        """Compute the gradient of one update, and find out whether it is a spike."""
        compute = partial(self.compute_gradient, batch, layout)
        if self.finder is not None:
            self.finder.begin(self.training.model, self.objective, batch.examples)
        gradient = compute() if self.compiled is None else self.compiled.compute(batch, compute)
        if self.finder is None:
            return gradient, None
        if layout.micro_batch == "auto":
            layout = replace(layout, at_most=gradient.micro_batch)
        again = partial(self.compute_gradient, batch, layout, self_check=False)
        past = None if self.run is None else self.run.read_norms
        return gradient, self.finder.inspect(batch.step, gradient, again, past=past)

    def compute_gradient(self, batch: Batch, layout: Layout, **others: Any) -> Gradient:
        """Compute the gradient of one update from all shares."""
        training = self.training
        gradient: Gradient = _batch_gradient(
            training.model,
            self.objective,
            batch.examples,
            key=batch.key,
            layout=layout,
            ids=batch.ids,
            reduction_state=training.reduction,
            loss_scale=training.loss_scale.value,
            group=self.rank_check.group,
            **{**self.how, **others} if others else self.how,
        )
        return gradient

    def update(
        self, batch: Batch, gradient: Gradient, layout: Layout, start: float, spike: Spike | None
    ) -> Step:
        """Update the weights from a gradient; skip the update if the gradient is not finite."""
        training, t = self.training, batch.step
        before = self.order.examples_before(t)
        ends_epoch = t + 1 == self.total or self.order.epoch(t + 1) != batch.epoch
        loss = check_loss(gradient, t)
        follow_schedule(training.optimizer, self.schedule, before)
        lr = float(training.optimizer.param_groups[0]["lr"])
        again = partial(self.compute_gradient, batch, layout)
        is_made = self.compiled is not None and self.compiled.has_stepped
        training.update(gradient, t, again, has_stepped=is_made)
        if isinstance(self.schedule, LRScheduler) and gradient.is_finite:
            self.schedule.step()
        return Step(
            step=t,
            epoch=batch.epoch,
            examples=before + gradient.num_examples,
            loss=loss,
            parts={name: part.item() for name, part in gradient.parts.items()},
            metrics={name: metric.item() for name, metric in gradient.metrics.items()},
            lr=lr,
            is_skipped=not gradient.is_finite,
            seconds=time.perf_counter() - start,
            ends_epoch=ends_epoch,
            gradient=gradient,
            spike=spike,
            save=partial(self.save, t + 1),
        )

    def save(self, num_updates: int) -> Checkpoint | None:
        """Checkpoint the present state, which must be the one after so many updates."""
        if self.run is None:
            raise RunError(
                "step.save() has nowhere to write. Pass a folder: steps(..., run='runs/name')."
            )
        if num_updates != self.training.num_updates:
            raise RunError(
                f"step {num_updates - 1} cannot be saved any more: the weights are those after "
                f"{self.training.num_updates} updates by now. Call step.save() in the body of the "
                f"loop, at its own step."
            )
        self.outside.check()
        self.training.body.leave()
        return self.run.write_checkpoint(self.training, self.rank_check.check(self.run.saved))
