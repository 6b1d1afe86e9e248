"""Train a run of a recipe to its end, or until [stop] ends it.

    recipe -> build -> create_run(...) or reopen_run(...) -> train

A loss that grows without end stops the run, and the message says what to change.
"""

import logging
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import cast

from anybatch import distributed
from anybatch.errors import DivergenceError
from anybatch.recipe.build import Setup, Split
from anybatch.recipe.code import has_code, hash_code
from anybatch.recipe.fit import describe_raw_bytes
from anybatch.recipe.runs import find_newest, read_first_loss
from anybatch.recipe.scaling import report_changes
from anybatch.recipe.stopping import Stopping
from anybatch.runs import checkpoints
from anybatch.runs.run import Run
from anybatch.runs.state import Stateful
from anybatch.training.evaluation import Evaluation
from anybatch.training.loop import Step

__all__ = ["Progress", "collect_state", "train"]

DIVERGENCE_FACTOR = 1000.0  # of the first loss, or of 1 if that is more

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One update and, after the last of an epoch, the evaluation of the model."""

    step: Step
    num_steps: int
    evaluations: Mapping[Split, Evaluation]  # of the monitored split; in the end of held_out too
    stopped: str | None  # reason why training stops early, after this update

    @property
    def held_out(self) -> Evaluation | None:
        """Evaluation on the held-out data. With validation data, only after the last update."""
        return self.evaluations.get("held_out")


def train(setup: Setup, run: Run) -> Iterator[Progress]:
    """Train from where the run is, to the end of its recipe or until [stop] ends it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from anybatch.recipe import build, find_recipe, read_recipe
        >>> from anybatch.recipe.runs import create_run
        >>> recipe = read_recipe(find_recipe("lenet-digits"), ["run.epochs=1"])
        >>> setup = build(recipe, allow_code=False)
        >>> with create_run(recipe, Path(tempfile.mkdtemp()) / "run") as run:
        ...     num_updates = len(list(train(setup, run)))
        >>> num_updates
        23

    Raises:
        DivergenceError: the loss is not finite, or `DIVERGENCE_FACTOR` times the first.
    """
    num_steps = setup.order.num_steps(setup.recipe.run.epochs)
    state, run.data = collect_state(setup), setup.data_fingerprint
    stopping = cast(Stopping | None, state.get("stopping"))
    if distributed.broadcast_from_first(lambda: _was_stopped(setup, run, stopping), run.group):
        return
    first_loss = distributed.broadcast_from_first(lambda: read_first_loss(run.folder), run.group)
    _record_start(setup, run, is_new=first_loss is None)
    setup.model.train()
    recipe = setup.recipe.run
    try:
        for step in setup.make_steps(
            clip=setup.clip,
            workers=setup.recipe.data.workers,
            state=state,
            run=run,
            group=run.group,
            bitwise=recipe.bitwise,
            shard=recipe.shard,
            compare_every=recipe.compare_every,
            self_check=recipe.self_check,
            compile=recipe.compile,
        ):
            first_loss = step.loss if first_loss is None else first_loss
            _check_divergence(step, first_loss)
            if step.spike is not None and distributed.get_rank(run.group) == 0:
                _log.warning("%s", step.spike.summary)
            setup.update_averages(step)
            progress = _end_step(setup, run, step, stopping, num_steps)
            yield progress
            if progress.stopped is not None:
                step.save()
                return
    except DivergenceError as error:
        raise DivergenceError(f"{error} {_advise_on_divergence(setup)}") from error


def collect_state(setup: Setup) -> dict[str, Stateful]:
    """Collect what checkpoints hold in addition to weights, optimiser and reduction."""
    state: dict[str, Stateful] = {}
    if setup.average is not None:
        state["average"] = setup.average
    if setup.adascale is not None:
        state["adascale"] = setup.adascale
    if setup.recipe.stop.metric is not None:
        state["stopping"] = Stopping(setup.recipe.stop, setup.monitor_split)
    return state


def _record_start(setup: Setup, run: Run, *, is_new: bool) -> None:
    """Record what a run starts from: rescaled keys, initial weights and user code."""
    report_changes(setup.scaled_recipe, setup.recipe.batch, run, is_new=is_new)
    if is_new and setup.weights_sha256 is not None:
        start = {"file": setup.recipe.model.weights, "sha256": setup.weights_sha256}
        run.record({"kind": "session", "step": 0, "weights": start})
    if is_new and (code := hash_code(setup.recipe)):
        run.record({"kind": "session", "step": 0, "code": code})


def _was_stopped(setup: Setup, run: Run, stopping: Stopping | None) -> bool:
    """Return whether the rules of [stop], as they are now, had already stopped the run."""
    if stopping is None:
        return False
    checkpoint = find_newest(run.folder, setup.recipe).checkpoint
    if checkpoint is None or checkpoint.step >= setup.order.num_steps(setup.recipe.run.epochs):
        return False
    stopping.load_state_dict(checkpoints.load(checkpoint)["user"]["stopping"])
    step, epoch_of = checkpoint.step, setup.order.epoch
    if step == 0 or epoch_of(step) == epoch_of(step - 1):
        return False  # it was saved within an epoch
    if stopping.reason is not None:
        _log.warning(_describe_resume(setup, run, stopping.reason))
    return stopping.reason is not None


def _end_step(
    setup: Setup, run: Run, step: Step, stopping: Stopping | None, num_steps: int
) -> Progress:
    """Evaluate the model if the epoch or training ends, and decide whether to stop."""
    evaluations: dict[Split, Evaluation] = {}
    monitor, reason, is_last = setup.monitor_split, None, step.step + 1 == num_steps
    if step.ends_epoch:
        evaluations[monitor] = _evaluate(setup, run, step, monitor, stopping)
        if stopping is not None and not is_last:
            reason = stopping.reason
    if reason is not None:
        row = {"kind": "stop", "step": step.step, "reason": reason}
        distributed.call_together(lambda: run.record(row), run.group)
        _log.warning(_describe_resume(setup, run, reason))
    if (is_last or reason is not None) and monitor != "held_out":
        evaluations["held_out"] = _evaluate(setup, run, step, "held_out", None)
    return Progress(step, num_steps, evaluations, reason)


def _describe_resume(setup: Setup, run: Run, reason: str) -> str:
    allow = " --allow-code" if has_code(setup.recipe) else ""
    return (
        f"stopped early: {reason}. To continue, set another stop.target or stop.patience: "
        f"anybatch resume {shlex.quote(str(run.folder))}{allow} --set KEY=VALUE"
    )


def _evaluate(
    setup: Setup, run: Run, step: Step, split: Split, stopping: Stopping | None
) -> Evaluation:
    """Evaluate the model, or the average of its weights, and record the result."""
    with setup.use_average():
        evaluation = setup.evaluate(split, group=run.group)
    row = {"kind": "evaluation", "step": step.step, "split": split} | asdict(evaluation)
    row["weights"] = "last" if setup.average is None else "average"
    if stopping is not None and math.isfinite(evaluation.loss):
        stopping.note(step.epoch, setup.list_figures(evaluation))
        best, value = stopping.best
        row["best"] = {"epoch": best, "value": value}
    distributed.call_together(lambda: run.record(row), run.group)
    if not math.isfinite(evaluation.loss):
        raise DivergenceError(
            f"the loss on the {split.replace('_', '-')} data is {evaluation.loss} after epoch "
            f"{step.epoch + 1}. It should be a finite number."
        )
    return evaluation


def _check_divergence(step: Step, first_loss: float) -> None:
    """Refuse a loss that is `DIVERGENCE_FACTOR` times the first."""
    if step.loss > DIVERGENCE_FACTOR * max(abs(first_loss), 1.0):
        raise DivergenceError(
            f"the loss grew from {first_loss:.4g} to {step.loss:.4g} by update "
            f"{step.step + 1}, in epoch {step.epoch + 1}."
        )


def _advise_on_divergence(setup: Setup) -> str:
    """Say what to change in a run that diverges."""
    if raw := describe_raw_bytes(setup.data):
        return f"It may be the data: {raw}"
    return (
        f"The learning rate was {setup.optimizer.param_groups[0]['lr']:g}: try a lower "
        f"optimizer.lr, schedule.warm_up or optimizer.clip_norm."
    )
