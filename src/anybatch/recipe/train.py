"""Train a run of a recipe to its end, or until [stop] says so.

    recipe -> build -> begun(...) or reopened(...) -> train

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
from anybatch.training import checkpoints
from anybatch.training.evaluation import Evaluation
from anybatch.training.run import Run
from anybatch.training.state import Stateful
from anybatch.training.steps import Step, steps

__all__ = ["Progress", "collect_state", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One update, and at the end of an epoch what the model is worth on data not trained on."""

    step: Step
    num_steps: int
    evaluations: Mapping[Split, Evaluation]  # of the validation data, or else the held-out data
    stopped: str | None  # why this update is the last, where it is before its time

    @property
    def held_out(self) -> Evaluation | None:
        """On the held-out data; with validation data after the last update alone."""
        return self.evaluations.get("held_out")


def train(setup: Setup, run: Run) -> Iterator[Progress]:
    """Train from where the run is, to the end of its recipe or until [stop] says so.

    Raises:
        DivergenceError: a loss that is not finite, or `DIVERGENCE_FACTOR`.
    """
    num_steps = setup.order.num_steps(setup.recipe.run.epochs)
    state, run.data = collect_state(setup), setup.data_fingerprint
    stopping = cast(Stopping | None, state.get("stopping"))
    if distributed.of_first(lambda: _was_stopped(setup, run, stopping), run.group):
        return
    first = distributed.of_first(lambda: read_first_loss(run.folder), run.group)
    report_changes(setup.scaled_recipe, setup.recipe.batch, run, is_new=first is None)
    if first is None and setup.weights_sha256 is not None:
        start = {"file": setup.recipe.model.weights, "sha256": setup.weights_sha256}
        run.record({"kind": "session", "step": 0, "weights": start})
    if first is None and (code := hash_code(setup.recipe)):
        run.record({"kind": "session", "step": 0, "code": code})
    setup.model.train()
    try:
        for step in _make_steps(setup, run, state):
            first = step.loss if first is None else first
            _check_divergence(step, first)
            setup.update_averages(step)
            found: dict[Split, Evaluation] = {}
            stopped, is_last = None, step.step + 1 == num_steps
            if step.ends_epoch:
                found = {
                    setup.monitor_split: _evaluate_split(
                        setup, run, step, setup.monitor_split, stopping
                    )
                }
                stopped = None if is_last else _record_stop(setup, run, step, stopping)
            if (is_last or stopped is not None) and setup.monitor_split != "held_out":
                found["held_out"] = _evaluate_split(setup, run, step, "held_out", None)
            yield Progress(step, num_steps, found, stopped)
            if stopped is not None:
                step.save()
                return
    except DivergenceError as error:
        raise DivergenceError(f"{error} {_advise_on_divergence(setup)}") from error


def collect_state(setup: Setup) -> dict[str, Stateful]:
    """What the checkpoints of a recipe's runs hold beside weights, optimiser and reduction."""
    state: dict[str, Stateful] = {}
    if setup.average is not None:
        state["average"] = setup.average
    if setup.adascale is not None:
        state["adascale"] = setup.adascale
    if setup.recipe.stop.metric is not None:
        state["stopping"] = Stopping(setup.recipe.stop)
    return state


def _was_stopped(setup: Setup, run: Run, stopping: Stopping | None) -> bool:
    """Whether the run was stopped already, by the rules as they are now."""
    if stopping is None:
        return False
    found = find_newest(run.folder, setup.recipe).found
    if found is None or found.step >= setup.order.num_steps(setup.recipe.run.epochs):
        return False
    stopping.load_state_dict(checkpoints.load(found)["user"]["stopping"])
    if found.step == 0 or setup.order.epoch(found.step) == setup.order.epoch(found.step - 1):
        return False  # saved amid an epoch
    if stopping.reason is not None:
        _log.warning(_describe_resume(setup, run, stopping.reason))
    return stopping.reason is not None


def _record_stop(setup: Setup, run: Run, step: Step, stopping: Stopping | None) -> str | None:
    """Why to stop after this update, recorded and told; None: go on."""
    if stopping is None or stopping.reason is None:
        return None
    row = {"kind": "stop", "step": step.step, "reason": stopping.reason}
    distributed.agreed(lambda: run.record(row), run.group)
    _log.warning(_describe_resume(setup, run, stopping.reason))
    return stopping.reason


def _describe_resume(setup: Setup, run: Run, reason: str) -> str:
    allow = " --allow-code" if has_code(setup.recipe) else ""
    return (
        f"stopped early: {reason}. To go on, set another stop.target or stop.patience: "
        f"anybatch resume {shlex.quote(str(run.folder))}{allow} --set KEY=VALUE"
    )


def _make_steps(setup: Setup, run: Run, state: Mapping[str, Stateful]) -> Iterator[Step]:
    return steps(
        setup.model,
        setup.objective,
        setup.optimizer,
        setup.training_data.columns,
        order=setup.order,
        epochs=setup.recipe.run.epochs,
        layout=setup.layout,
        observe=setup.observe,
        clip=setup.clip,
        collate=setup.data.collate,
        schedule=setup.schedule,
        precision=setup.recipe.run.precision,
        workers=setup.recipe.data.workers,
        state=state,
        run=run,
        group=run.group,
        bitwise=setup.recipe.run.bitwise,
        shard=setup.recipe.run.shard,
        compare_every=setup.recipe.run.compare_every,
        self_check=setup.recipe.run.self_check,
    )


def _evaluate_split(
    setup: Setup, run: Run, step: Step, part: Split, stopping: Stopping | None
) -> Evaluation:
    """What the model is worth after an epoch, by the average of its weights if there is one."""
    with setup.use_average():
        found = setup.evaluate(part, group=run.group)
    row = {"kind": "evaluation", "step": step.step, "split": part} | asdict(found)
    row["weights"] = "last" if setup.average is None else "average"
    if stopping is not None and math.isfinite(found.loss):
        stopping.note(step.epoch, found)
        best, value = stopping.best
        row["best"] = {"epoch": best, "value": value}
    distributed.agreed(lambda: run.record(row), run.group)
    if not math.isfinite(found.loss):
        raise DivergenceError(
            f"the loss on the {part.replace('_', '-')} data is {found.loss} after epoch "
            f"{step.epoch + 1}, expected a finite number."
        )
    return found


DIVERGENCE_FACTOR = 1000.0
"""A loss this many times the first (or 1, whichever is more) is no training any more."""


def _check_divergence(step: Step, first: float) -> None:
    """Refuse a loss that is `DIVERGENCE_FACTOR`.

    Raises:
        DivergenceError: it is.
    """
    if step.loss > DIVERGENCE_FACTOR * max(abs(first), 1.0):
        raise DivergenceError(
            f"the loss grew from {first:.4g} to {step.loss:.4g} by update "
            f"{step.step + 1}, in epoch {step.epoch + 1}."
        )


def _advise_on_divergence(setup: Setup) -> str:
    """Say what to do about a run that diverges."""
    if raw := describe_raw_bytes(setup.data):
        return f"It may be the data: {raw}"
    return (
        f"The learning rate was {setup.optimizer.param_groups[0]['lr']:g}: try a lower "
        f"optimizer.lr, schedule.warm_up or optimizer.clip_norm."
    )
