"""One run of a comparison: train it or resume it, evaluate it, and read its results.

    RUN/records.jsonl    with a row {"kind": "comparison", "step": t, "loss": mean loss} an update
    RUN/outcome.json     steps, and the figures on the held-out data; written in the end

Losses are means over examples, whatever the reduction, and without penalties. Otherwise recipes
that differ in these could not be compared. If there are several terms, or a reduction of the
user's, the loss is the sum of the reduced terms.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from anybatch.advice.curves import Curve
from anybatch.errors import RunError
from anybatch.limits import read_json
from anybatch.objective import DATA, Objective
from anybatch.recipe.build import Setup, build
from anybatch.recipe.results import restore_run
from anybatch.recipe.runs import create_run, find_newest, reopen_run
from anybatch.recipe.schema import Recipe
from anybatch.recipe.train import train
from anybatch.reductions import Mean
from anybatch.runs.disk import check_file, read_file, replace_file
from anybatch.runs.records import are_numbers, read_recipe_records
from anybatch.training.loop import Step

__all__ = ["Outcome", "Trial", "read_curve", "read_outcome", "train_trial"]

_FILE = "outcome.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Recipe with a seed, and the folder of its run."""

    name: str  # of the recipe in the comparison
    recipe: Recipe
    folder: Path
    allow_code: bool
    accept_data: bool = False  # whether it may continue on other data

    @property
    def seed(self) -> int:
        """Seed of initial weights, order and random numbers."""
        return self.recipe.run.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a run that has ended."""

    steps: int
    held_out: dict[str, float]  # "loss" and each metric


def train_trial(
    trial: Trial, report: Callable[[int, int, float], None], is_stopped: Callable[[], bool]
) -> Outcome | None:
    """Train to the end, from wherever the run is.

    Args:
        report: called after each update with the number of updates, their total, and the loss.
        is_stopped: whether to save the run and stop.

    Returns:
        The outcome; None if it was stopped, and can be resumed.
    """
    folder, allow_code = trial.folder, trial.allow_code
    is_new = not (folder / "recipe.toml").exists()  # also if it was stopped while it was made
    fresh = is_new or find_newest(folder, trial.recipe).checkpoint is None
    setup = build(trial.recipe, allow_code=allow_code, fresh=fresh)
    num_steps = 0
    accept_data = trial.accept_data
    if is_new:
        opening = create_run(trial.recipe, folder)
    else:
        opening = reopen_run(setup, folder, accept_data=accept_data)
    with opening as run:
        for progress in train(setup, run):
            step = progress.step
            loss = _compute_mean_loss(step, setup.objective)
            run.record({"kind": "comparison", "step": step.step, "loss": loss})
            num_steps = step.step + 1
            report(num_steps, progress.num_steps, loss)
            is_last = num_steps == progress.num_steps or progress.stopped is not None
            if not is_last and is_stopped():
                step.save()
                return None
    if not num_steps:  # the run had ended already, and the weights are in its last checkpoint
        setup, checkpoint = restore_run(folder, allow_code=allow_code, accept_data=accept_data)
        num_steps = checkpoint.step
    read_curve(folder, num_steps)  # refuses a run that another command has resumed
    outcome = Outcome(steps=num_steps, held_out=_evaluate_held_out(setup))
    replace_file(folder / _FILE, [json.dumps(asdict(outcome)) + "\n"])
    return outcome


def read_outcome(folder: Path) -> Outcome | None:
    """Read the outcome of a run; None if it has not ended.

    Raises:
        RunError: `train_trial` has not written the file.
    """
    file = folder / _FILE
    check_file(file)
    if not file.exists():
        return None
    refusal = RunError(
        f"{file} was not written by anybatch, or is damaged. Remove it: the run is then evaluated "
        f"again."
    )
    try:
        outcome = Outcome(**read_json(read_file(file)))
    except (ValueError, TypeError) as error:
        raise refusal from error
    is_valid = type(outcome.steps) is int and outcome.steps > 0 and are_numbers(outcome.held_out)
    if not is_valid or None in outcome.held_out.values():
        raise refusal
    return outcome


def read_curve(folder: Path, num_steps: int) -> Curve:
    """Read the training loss of the first updates of a run.

    Raises:
        RunError: some updates were made outside of a comparison, and have no loss.
    """
    records = read_recipe_records(folder / "records.jsonl")
    rows = [row for row in records if row["step"] < num_steps]
    steps = [row for row in rows if row["kind"] == "step"]
    losses = [row["loss"] for row in rows if row["kind"] == "comparison"]
    if not steps or len(losses) != len(steps):
        raise RunError(
            f"{folder} has made {len(steps)} updates, but only {len(losses)} of them in a "
            f"comparison. Was it continued by 'anybatch resume'? Remove the folder, and the run "
            f"is made again."
        )
    return Curve(
        ends=[row["examples"] for row in steps],
        losses=[math.nan if loss is None else loss for loss in losses],
        first_epoch=max(row["examples"] for row in steps if row["epoch"] == steps[0]["epoch"]),
    )


def _is_plain(objective: Objective) -> bool:
    """Return whether the loss has one term, reduced by one of our reductions."""
    reductions = objective.reductions
    return list(reductions) == [DATA] and not reductions[DATA].takes_vectors


def _compute_mean_loss(step: Step, objective: Objective) -> float:
    if not _is_plain(objective):
        return sum(step.parts[name] for name in objective.reductions)
    term = step.gradient.terms[DATA]
    return float(term.values[term.present].double().sum() / term.weights.double().sum())


def _evaluate_held_out(setup: Setup) -> dict[str, float]:
    objective = replace(setup.objective, penalty=None)
    if _is_plain(objective):
        objective = replace(objective, reduction=Mean())
    with setup.use_average():
        evaluation = setup.evaluate("held_out", objective=objective)
    return {"loss": evaluation.loss, **evaluation.metrics}
