"""Weights of a run as they were before one of its updates.

    the newest good checkpoint at or before step N, or the recipe's own start  ->  updates up to N

The updates in between are made again, from the same batches, keys and rates, so they are the same
on the machine of the run. Nothing is written.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anybatch.errors import CheckpointError, RunError
from anybatch.gradient import batch_gradient
from anybatch.pytree import Uncollated
from anybatch.recipe.build import Setup, build
from anybatch.recipe.code import permit_code
from anybatch.recipe.files import fingerprint_recipe
from anybatch.recipe.objectives import build_objective
from anybatch.recipe.runs import compare_data, read_run_recipe
from anybatch.recipe.schema import Recipe
from anybatch.recipe.train import collect_state
from anybatch.report.default_step import Rows, choose_step, seconds_to_reach
from anybatch.training import checkpoints
from anybatch.training.batches import Batch, batches, reader
from anybatch.training.checkpoints import Checkpoint
from anybatch.training.optimizers import set_rates
from anybatch.training.precision import LossScale
from anybatch.training.records import read_recipe_records
from anybatch.training.state import TrainingState

__all__ = ["Position", "arguments", "batch_of_step", "good_checkpoints", "position"]

MOST_SECONDS = 120.0
"""Seconds that replaying may take, by the run's own records."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A run before one of its updates."""

    setup: Setup
    state: TrainingState
    step: int  # the update that comes next
    base: Checkpoint | None  # what the weights were taken from; None: the recipe's start
    checkpoints: list[Checkpoint]  # all good ones, newest first
    reason: str | None = None  # why this update was chosen; None: the user named it


def position(
    folder: Path, step: int | None, *, allow_code: bool, accept_data: bool = False
) -> Position:
    """Build a run and bring it to its state before an update.

    Args:
        folder: the run.
        step: the update; None: one that shows something, see `default_step`.
        allow_code: whether code that the recipe names may be imported.
        accept_data: whether other data than the run's are accepted.

    Raises:
        RunError: no run, or a step that it has not or that is too far from a checkpoint; and what
            building and training raise.
    """
    recipe = read_run_recipe(folder)
    good = good_checkpoints(folder, recipe)
    newest = good[0].step if good else 0
    rows = read_recipe_records(folder / "records.jsonl")
    kept, reason = [one.step for one in good], None
    may = permit_code(folder, recipe, allow_code=allow_code)
    if step is None:
        penalty = build_objective(recipe.objective, allow_code=may).penalty
        names = [part.part for part in penalty or ()]
        step, reason = choose_step(rows, names, kept) or (newest, None)
    base = next((one for one in good if one.step <= step), None)
    setup = build(recipe, allow_code=may, fresh=base is None)
    if good:  # before the first checkpoint there is no fingerprint but that of a later one
        compare_data(folder, base or good[-1], setup, accept=accept_data)
    _check_step(step, max(newest, setup.order.num_steps(recipe.run.epochs)))
    _check_distance(folder, step, rows, kept)
    loss_scale = LossScale(recipe.run.precision)
    state = TrainingState(setup.model, setup.optimizer, collect_state(setup), loss_scale=loss_scale)
    if base is not None:
        state.restore(checkpoints.load(base))
        state.num_updates = base.step
    setup.model.train()
    _replay(setup, state, step)
    return Position(setup=setup, state=state, step=step, base=base, checkpoints=good, reason=reason)


def good_checkpoints(folder: Path, recipe: Recipe) -> list[Checkpoint]:
    """Return the checkpoints that verify, newest first.

    Raises:
        RunError: one that was made with another recipe; CheckpointError: none that verifies,
            although there are some.
    """
    found, refused = [], []
    for path in checkpoints.named(folder / "checkpoints"):
        try:
            found.append(checkpoints.verify(path))
        except CheckpointError as error:
            refused.append(str(error))
    if refused and not found:
        raise CheckpointError("No checkpoint verifies:\n  " + "\n  ".join(refused))
    for reason in refused:
        _log.warning("a checkpoint is passed over: %s", reason)
    for one in found:
        if one.settings.get("recipe") != fingerprint_recipe(recipe):
            raise RunError(
                f"{folder / 'recipe.toml'} is not the recipe that {one.path.name} was made with: "
                f"was it edited? Put it back."
            )
    return found


def batch_of_step(setup: Setup, step: int) -> Batch:
    """Return the examples, ids and key of an update."""
    return next(iter(_batches(setup, step, step + 1)))


def batch_of_ids(setup: Setup, ids: Tensor) -> Any:
    """Return examples of the data by their ids."""
    data = setup.training_data
    found = reader(data.columns, raw=data.collate is not None)(ids)
    if data.collate is None:
        return found
    return Uncollated(found, data.collate)


def arguments(position: Position) -> dict[str, Any]:
    """Return the arguments of `batch_gradient` at this update, except the batch and its key."""
    return _arguments(position.setup, position.state)


def _arguments(setup: Setup, state: TrainingState) -> dict[str, Any]:
    return {
        "layout": setup.layout,
        "clip": setup.clip,
        "precision": setup.recipe.run.precision,
        "reduction_state": state.reduction,
        "loss_scale": state.loss_scale.value,
    }


def _batches(setup: Setup, start: int, stop: int) -> Iterator[Batch]:
    data = setup.training_data
    return batches(data.columns, setup.order, start, stop=stop, collate=data.collate)


def _replay(setup: Setup, state: TrainingState, stop: int) -> None:
    """Make the updates up to `stop`, as `steps` has made them."""
    for batch in _batches(setup, state.num_updates, stop):
        gradient = batch_gradient(
            setup.model,
            setup.objective,
            batch.examples,
            key=batch.key,
            ids=batch.ids,
            observe=setup.observe,
            **_arguments(setup, state),
        )
        set_rates(setup.optimizer, setup.schedule(setup.order.examples_before(batch.step)))
        state.loss_scale.note(is_finite=gradient.is_finite, step=batch.step)
        if gradient.is_finite:
            setup.optimizer.step()
            state.reduction = gradient.reduction_state
        if setup.adascale is not None:
            setup.adascale.update(gradient)
        state.num_updates = batch.step + 1


def _check_step(step: int, num_steps: int) -> None:
    if not 0 <= step <= num_steps:
        raise RunError(
            f"There is no step {step}. The run has the steps 0 to {num_steps}; {num_steps} is the "
            f"one after its last."
        )


def _check_distance(folder: Path, step: int, rows: Rows, checkpoints: list[int]) -> None:
    """Refuse to replay for longer than one waits for a page."""
    needed = seconds_to_reach(rows, checkpoints)(step)
    if needed > MOST_SECONDS:
        start = max(one for one in (0, *checkpoints) if one <= step)
        near = sorted({*checkpoints}, key=lambda other: (abs(other - step), other))
        raise RunError(
            f"step {step} of {folder} is {step - start} updates after the checkpoint before it. "
            f"Replaying them takes about {needed:.0f} seconds by the run's own records, and at "
            f"most {MOST_SECONDS:.0f} are allowed. Nearest steps without a wait: "
            f"{', '.join(map(str, near)) or '0'}. Runs keep more checkpoints by run.keep."
        )
