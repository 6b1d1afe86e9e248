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
from anybatch.recipe.build import Built, Part
from anybatch.recipe.code import code_of, names_code
from anybatch.recipe.fit import describe_raw_bytes
from anybatch.recipe.runs import first_loss, newest
from anybatch.recipe.scaling import tell
from anybatch.recipe.stopping import Stopping
from anybatch.training import checkpoints
from anybatch.training.evaluation import Evaluation
from anybatch.training.run import Run
from anybatch.training.state import Stateful
from anybatch.training.steps import Step, steps

__all__ = ["Progress", "carried", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One update, and at the end of an epoch what the model is worth on data not trained on."""

    step: Step
    num_steps: int
    evaluations: Mapping[Part, Evaluation]  # of the validation data, or else the held-out data
    stopped: str | None  # why this update is the last, where it is before its time

    @property
    def held_out(self) -> Evaluation | None:
        """On the held-out data; with validation data after the last update alone."""
        return self.evaluations.get("held_out")


def train(built: Built, run: Run) -> Iterator[Progress]:
    """Train from where the run is, to the end of its recipe or until [stop] says so.

    Raises:
        DivergenceError: a loss that is not finite, or `DIVERGED`.
    """
    num_steps = built.order.num_steps(built.recipe.run.epochs)
    state, run.data = carried(built), built.data_fingerprint
    stopping = cast(Stopping | None, state.get("stopping"))
    if distributed.of_first(lambda: _has_stopped(built, run, stopping), run.group):
        return
    first = distributed.of_first(lambda: first_loss(run.folder), run.group)
    tell(built.carried, built.recipe.batch, run, is_new=first is None)
    if first is None and built.weights_sha256 is not None:
        start = {"file": built.recipe.model.weights, "sha256": built.weights_sha256}
        run.record({"kind": "session", "step": 0, "weights": start})
    if first is None and (code := code_of(built.recipe)):
        run.record({"kind": "session", "step": 0, "code": code})
    built.model.train()
    try:
        for step in _updates(built, run, state):
            first = step.loss if first is None else first
            refuse_divergence(step, first)
            built.note(step)
            found: dict[Part, Evaluation] = {}
            stopped, is_last = None, step.step + 1 == num_steps
            if step.ends_epoch:
                found = {built.watched: _evaluated(built, run, step, built.watched, stopping)}
                stopped = None if is_last else _stopped(built, run, step, stopping)
            if (is_last or stopped is not None) and built.watched != "held_out":
                found["held_out"] = _evaluated(built, run, step, "held_out", None)
            yield Progress(step, num_steps, found, stopped)
            if stopped is not None:
                step.save()
                return
    except DivergenceError as error:
        raise DivergenceError(f"{error} {advise_on_divergence(built)}") from error


def carried(built: Built) -> dict[str, Stateful]:
    """What the checkpoints of a recipe's runs hold beside weights, optimiser and reduction."""
    state: dict[str, Stateful] = {}
    if built.average is not None:
        state["average"] = built.average
    if built.adascale is not None:
        state["adascale"] = built.adascale
    if built.recipe.stop.metric is not None:
        state["stopping"] = Stopping(built.recipe.stop)
    return state


def _has_stopped(built: Built, run: Run, stopping: Stopping | None) -> bool:
    """Whether the run was stopped already, by the rules as they are now."""
    if stopping is None:
        return False
    found = newest(run.folder, built.recipe).found
    if found is None or found.step >= built.order.num_steps(built.recipe.run.epochs):
        return False
    stopping.load_state_dict(checkpoints.load(found)["user"]["stopping"])
    if found.step == 0 or built.order.epoch(found.step) == built.order.epoch(found.step - 1):
        return False  # saved amid an epoch
    if stopping.reason is not None:
        _log.warning(_how_to_go_on(built, run, stopping.reason))
    return stopping.reason is not None


def _stopped(built: Built, run: Run, step: Step, stopping: Stopping | None) -> str | None:
    """Why to stop after this update, recorded and told; None: go on."""
    if stopping is None or stopping.reason is None:
        return None
    row = {"kind": "stop", "step": step.step, "reason": stopping.reason}
    distributed.agreed(lambda: run.record(row), run.group)
    _log.warning(_how_to_go_on(built, run, stopping.reason))
    return stopping.reason


def _how_to_go_on(built: Built, run: Run, reason: str) -> str:
    allow = " --allow-code" if names_code(built.recipe) else ""
    return (
        f"stopped early: {reason}. To go on, set another stop.target or stop.patience: "
        f"anybatch resume {shlex.quote(str(run.folder))}{allow} --set KEY=VALUE"
    )


def _updates(built: Built, run: Run, state: Mapping[str, Stateful]) -> Iterator[Step]:
    return steps(
        built.model,
        built.objective,
        built.optimizer,
        built.drawn.columns,
        order=built.order,
        epochs=built.recipe.run.epochs,
        layout=built.layout,
        observe=built.observe,
        clip=built.clip,
        collate=built.data.collate,
        schedule=built.schedule,
        precision=built.recipe.run.precision,
        workers=built.recipe.data.workers,
        state=state,
        run=run,
        group=run.group,
        bitwise=built.recipe.run.bitwise,
        shard=built.recipe.run.shard,
        compare_every=built.recipe.run.compare_every,
        self_check=built.recipe.run.self_check,
    )


def _evaluated(
    built: Built, run: Run, step: Step, part: Part, stopping: Stopping | None
) -> Evaluation:
    """What the model is worth after an epoch, by the average of its weights if there is one."""
    with built.by_average():
        found = built.evaluated(part, group=run.group)
    row = {"kind": "evaluation", "step": step.step, "split": part} | asdict(found)
    row["weights"] = "last" if built.average is None else "average"
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


DIVERGED = 1000.0
"""A loss this many times the first (or 1, whichever is more) is no training any more."""


def refuse_divergence(step: Step, first: float) -> None:
    """Refuse a loss that is `DIVERGED`.

    Raises:
        DivergenceError: it is.
    """
    if step.loss > DIVERGED * max(abs(first), 1.0):
        raise DivergenceError(
            f"the loss grew from {first:.4g} to {step.loss:.4g} by update "
            f"{step.step + 1}, in epoch {step.epoch + 1}."
        )


def advise_on_divergence(built: Built) -> str:
    """Say what to do about a run that diverges."""
    if raw := describe_raw_bytes(built.data):
        return f"It may be the data: {raw}"
    return (
        f"The learning rate was {built.optimizer.param_groups[0]['lr']:g}: try a lower "
        f"optimizer.lr, schedule.warm_up or optimizer.clip_norm."
    )
