"""One run of a comparison: trained or gone on with, judged, and read again.

    RUN/records.jsonl    with a row {"kind": "comparison", "step": t, "loss": mean loss} an update
    RUN/outcome.json     steps, and the figures on the held-out data; written once all is done

Losses are means over examples, whatever the reduction, and without penalties: else recipes that
differ in these could not be compared. Where there are several terms, or a reduction of one's own,
it is the sum of the terms as they are reduced.
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
from anybatch.recipe.build import Built, build
from anybatch.recipe.results import restored
from anybatch.recipe.runs import begun, newest, reopened, train
from anybatch.recipe.schema import Recipe
from anybatch.reductions import Mean
from anybatch.training.disk import check_file, read_file, replace_file
from anybatch.training.records import are_numbers, read_recipe_records
from anybatch.training.steps import Step

__all__ = ["Outcome", "Trial", "curve_of", "outcome_of", "run_trial"]

_FILE = "outcome.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A recipe with a seed, and where its run lies."""

    name: str  # of the recipe in the comparison
    recipe: Recipe
    folder: Path
    allow_code: bool
    accept_data: bool = False  # whether it may go on with other data

    @property
    def seed(self) -> int:
        """Of initial weights, order and random numbers."""
        return self.recipe.run.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    steps: int
    held_out: dict[str, float]  # "loss" and each metric


def run_trial(
    trial: Trial, told: Callable[[int, int, float], None], is_stopped: Callable[[], bool]
) -> Outcome | None:
    """Train to the end, from wherever the run is.

    Args:
        told: is called after each update with their number, how many there are to be, and the loss.
        is_stopped: whether to save and leave it there.

    Returns:
        How it ended; None: it was stopped, and can be gone on with.
    """
    is_begun = (trial.folder / "recipe.toml").exists()  # or it was stopped as it was made
    fresh = not is_begun or newest(trial.folder, trial.recipe).found is None
    built = build(trial.recipe, allow_code=trial.allow_code, fresh=fresh)
    steps = 0
    opening = (
        reopened(built, trial.folder, accept_data=trial.accept_data)
        if is_begun
        else begun(trial.recipe, trial.folder)
    )
    with opening as run:
        for now in train(built, run):
            loss = _mean_loss(now.step, built.objective)
            run.record({"kind": "comparison", "step": now.step.step, "loss": loss})
            steps = now.step.step + 1
            told(steps, now.num_steps, loss)
            is_last = steps == now.num_steps or now.stopped is not None
            if not is_last and is_stopped():
                now.step.save()
                return None
    if not steps:  # all was done already, and the weights are those of the last checkpoint
        built, checkpoint = restored(
            trial.folder, allow_code=trial.allow_code, accept_data=trial.accept_data
        )
        steps = checkpoint.step
    curve_of(trial.folder, steps)
    outcome = Outcome(steps=steps, held_out=_held_out(built))
    replace_file(trial.folder / _FILE, [json.dumps(asdict(outcome)) + "\n"])
    return outcome


def outcome_of(folder: Path) -> Outcome | None:
    """Read how a run ended; None: it has not.

    Raises:
        RunError: a file that `run_trial` has not written.
    """
    file = folder / _FILE
    check_file(file)
    if not file.exists():
        return None
    try:
        outcome = Outcome(**read_json(read_file(file)))
    except (ValueError, TypeError) as error:
        raise _refuse_outcome(file) from error
    is_sound = type(outcome.steps) is int and outcome.steps > 0 and are_numbers(outcome.held_out)
    if not is_sound or None in outcome.held_out.values():
        raise _refuse_outcome(file)
    return outcome


def _refuse_outcome(file: Path) -> RunError:
    return RunError(
        f"{file} was not written by anybatch, or it is damaged. Remove it: the run is then judged "
        f"again by its last checkpoint."
    )


def curve_of(folder: Path, steps: int) -> Curve:
    """The training loss of the first updates of a run.

    Raises:
        RunError: updates that were made without noting it.
    """
    records = read_recipe_records(folder / "records.jsonl")
    rows = [row for row in records if row["step"] < steps]
    made = [row for row in rows if row["kind"] == "step"]
    losses = [row["loss"] for row in rows if row["kind"] == "comparison"]
    if not made or len(losses) != len(made):
        raise RunError(
            f"{folder} has made {len(made)} updates, {len(losses)} of them in a comparison, "
            f"expected all of them: was it gone on with by 'anybatch resume'? Remove the folder, "
            f"and the run is made again."
        )
    return Curve(
        ends=[row["examples"] for row in made],
        losses=[math.nan if loss is None else loss for loss in losses],
        first_epoch=max(row["examples"] for row in made if row["epoch"] == made[0]["epoch"]),
    )


def _is_plain(objective: Objective) -> bool:
    reductions = objective.reductions
    return list(reductions) == [DATA] and not reductions[DATA].takes_vectors


def _mean_loss(step: Step, objective: Objective) -> float:
    if not _is_plain(objective):
        return sum(step.parts[name] for name in objective.reductions)
    term = step.gradient.terms[DATA]
    return float(term.values[term.present].double().sum() / term.weights.double().sum())


def _held_out(built: Built) -> dict[str, float]:
    objective = replace(built.objective, penalty=None)
    if _is_plain(objective):
        objective = replace(objective, reduction=Mean())
    with built.by_average():
        found = built.evaluated("held_out", objective=objective)
    return {"loss": found.loss, **found.metrics}
