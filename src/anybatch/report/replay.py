"""Restore a run to its state before one of its updates.

    the newest good checkpoint at or before step N, or the recipe's own start  ->  updates up to N

The updates in between are computed again, from the same batches, keys and rates. On the machine of
the run they are the same. Nothing is written.

If the user names no step, it is the first one at which the data loss has fallen half of its way.
Some examples are learned by then and others are not, so their losses and gradients differ. After
the end of a run they hardly do.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from anybatch.errors import CheckpointError, RunError
from anybatch.examples import make_reader
from anybatch.optim.loss_scale import LossScale
from anybatch.optim.rates import set_rates
from anybatch.pytree import Uncollated
from anybatch.recipe.build import Setup, build
from anybatch.recipe.code import permit_code
from anybatch.recipe.objectives import build_objective
from anybatch.recipe.runs import check_recipe, compare_data, read_run_recipe
from anybatch.recipe.schema import Recipe
from anybatch.recipe.train import collect_state
from anybatch.runs import checkpoints
from anybatch.runs.checkpoints import Checkpoint
from anybatch.runs.records import read_recipe_records
from anybatch.runs.state import TrainingState
from anybatch.training.batches import Batch, batches

__all__ = [
    "Position",
    "Rows",
    "choose_step",
    "estimate_seconds",
    "get_arguments",
    "read_batch",
    "read_examples",
    "restore_position",
    "sum_data_loss",
]

MAX_SECONDS = 120.0
"""Seconds that replaying may take, by the run's own records."""

PATIENCE = 15.0
"""Seconds that replaying may take if the user has named no step."""

WINDOW = 5
"""Updates over which the loss is averaged, since single batches differ."""

Rows = Sequence[Mapping[str, Any]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """State of a run before one of its updates."""

    setup: Setup
    state: TrainingState
    step: int  # the next update
    base: Checkpoint | None  # whose weights were loaded; None: the recipe's start
    checkpoints: list[Checkpoint]  # all good ones, newest first
    reason: str | None = None  # why this update was chosen; None: the user named it


def restore_position(
    folder: Path, step: int | None, *, allow_code: bool, accept_data: bool = False
) -> Position:
    """Build a run and restore its state before an update.

    Args:
        step: the update; None: see `choose_step`.

    Raises:
        RunError: no run, or a step that it does not have or that is too far from a checkpoint;
            and what building and training raise.
    """
    recipe = read_run_recipe(folder)
    good = _verify_checkpoints(folder, recipe)
    newest = good[0].step if good else 0
    rows = read_recipe_records(folder / "records.jsonl")
    steps, reason = [checkpoint.step for checkpoint in good], None
    may = permit_code(folder, recipe, allow_code=allow_code)
    if step is None:
        penalty = build_objective(recipe.objective, allow_code=may).penalty
        names = [part.part for part in penalty or ()]
        step, reason = choose_step(rows, names, steps) or (newest, None)
    base = next((checkpoint for checkpoint in good if checkpoint.step <= step), None)
    setup = build(recipe, allow_code=may, fresh=base is None)
    if good:  # checkpoints hold the fingerprint; before the first one, that of a later one
        compare_data(folder, base or good[-1], setup, accept=accept_data)
    _check_step(step, max(newest, setup.order.num_steps(recipe.run.epochs)))
    _check_distance(folder, step, rows, steps)
    loss_scale = LossScale(recipe.run.precision)
    state = TrainingState(setup.model, setup.optimizer, collect_state(setup), loss_scale=loss_scale)
    if base is not None:
        state.restore(checkpoints.load(base))
        state.num_updates = base.step
    setup.model.train()
    _replay(setup, state, step)
    return Position(setup=setup, state=state, step=step, base=base, checkpoints=good, reason=reason)


def _verify_checkpoints(folder: Path, recipe: Recipe) -> list[Checkpoint]:
    """Return the checkpoints that are whole, newest first."""
    good, errors = [], []
    for path in checkpoints.list_paths(folder / "checkpoints"):
        try:
            good.append(checkpoints.verify(path))
        except CheckpointError as error:
            errors.append(str(error))
    if errors and not good:
        raise CheckpointError("No checkpoint verifies:\n  " + "\n  ".join(errors))
    for reason in errors:
        _log.warning("a checkpoint is skipped: %s", reason)
    for checkpoint in good:
        check_recipe(folder, recipe, checkpoint)
    return good


def read_batch(setup: Setup, step: int) -> Batch:
    """Read the examples, ids and key of an update."""
    return next(iter(_iterate_batches(setup, step, step + 1)))


def read_examples(setup: Setup, ids: Tensor) -> Any:
    """Read examples of the data by their ids."""
    data = setup.training_data
    examples = make_reader(data.columns, raw=data.collate is not None)(ids)
    return examples if data.collate is None else Uncollated(examples, data.collate)


def get_arguments(position: Position) -> dict[str, Any]:
    """Return the arguments of `batch_gradient` at this update, except the batch and its key."""
    return _get_arguments(position.setup, position.state)


def _get_arguments(setup: Setup, state: TrainingState) -> dict[str, Any]:
    return {
        "layout": setup.layout,
        "clip": setup.clip,
        "precision": setup.recipe.run.precision,
        "reduction_state": state.reduction,
        "loss_scale": state.loss_scale.value,
    }


def _iterate_batches(setup: Setup, start: int, stop: int) -> Iterator[Batch]:
    data = setup.training_data
    return batches(data.columns, setup.order, start, stop=stop, collate=data.collate)


def _replay(setup: Setup, state: TrainingState, stop: int) -> None:
    """Make the updates before `stop`, as `steps` made them."""
    for batch in _iterate_batches(setup, state.num_updates, stop):
        how = _get_arguments(setup, state) | {"key": batch.key, "ids": batch.ids}
        gradient = setup.compute_gradient(batch.examples, observe=setup.observe, **how)
        set_rates(state.optimizer, setup.schedule(setup.order.examples_before(batch.step)))
        state.update(gradient, batch.step)
        if setup.adascale is not None:
            setup.adascale.update(gradient)


def _check_step(step: int, num_steps: int) -> None:
    if not 0 <= step <= num_steps:
        raise RunError(
            f"There is no step {step}. The run has the steps 0 to {num_steps}; {num_steps} is the "
            f"one after its last."
        )


def _check_distance(folder: Path, step: int, rows: Rows, checkpoints: list[int]) -> None:
    """Refuse to replay for longer than a user waits for a page."""
    seconds = estimate_seconds(rows, checkpoints)(step)
    if seconds > MAX_SECONDS:
        start = max(other for other in (0, *checkpoints) if other <= step)
        near = sorted({*checkpoints}, key=lambda other: (abs(other - step), other))
        raise RunError(
            f"step {step} of {folder} is {step - start} updates after the checkpoint before it. "
            f"Replaying them takes about {seconds:.0f} seconds by the run's own records, and at "
            f"most {MAX_SECONDS:.0f} are allowed. Nearest steps without a wait: "
            f"{', '.join(map(str, near)) or '0'}. Runs keep more checkpoints by run.keep."
        )


def choose_step(
    rows: Rows, penalties: Sequence[str], checkpoints: Sequence[int]
) -> tuple[int, str] | None:
    """Choose a step at which examples differ, and say why.

    Args:
        rows: the records of the run.
        penalties: names of the parts of the loss that are penalties.
        checkpoints: the steps of the run's checkpoints.

    Returns:
        The step and the reason, in a sentence or two; None if nothing is recorded.
    """
    losses = {}
    for row in rows:
        if row["kind"] == "step" and not row.get("skipped"):
            loss = sum_data_loss(row["parts"], penalties)
            if loss is not None:
                losses[row["step"]] = loss
    if not losses:
        return None
    steps = list(losses)
    means = _average_windows(list(losses.values()))
    half = (means[0] + min(means)) / 2
    wanted = next((k for k, mean in enumerate(means) if mean <= half), 0)
    if wanted == 0:
        wanted = len(steps) // 10
    seconds = estimate_seconds(rows, checkpoints)
    quick = [k for k, step in enumerate(steps) if seconds(step) <= PATIENCE] or [0]
    place = min(quick, key=lambda k: abs(k - wanted))
    is_half = place == wanted and place > 0 and means[place] <= half
    where = "about half of the way" if is_half else "early in the run"
    if place != wanted:
        where = "the one closest to half of the way that is quick to make again"
    reason = (
        f"This step is shown because it is {where}: averaged over {WINDOW} steps, the data loss "
        f"begins at {means[0]:.3g}, is {means[place]:.3g} here, and {min(means):.3g} at its lowest."
    )
    if is_half:
        reason += " So some examples are learned and others are not."
    return steps[place], reason


def sum_data_loss(parts: Mapping[str, float | None], penalties: Sequence[str]) -> float | None:
    """Add up the parts of a loss that are no penalty; None if one of them is not finite."""
    values = [value for name, value in parts.items() if name not in penalties]
    finite = [value for value in values if value is not None]
    return sum(finite) if values and len(finite) == len(values) else None


def estimate_seconds(rows: Rows, checkpoints: Sequence[int]) -> Callable[[int], float]:
    """Return a function that estimates how long replaying up to a step takes, by the records."""
    seconds = {row["step"]: row["seconds"] or 0.0 for row in rows if row["kind"] == "step"}
    steps, starts = sorted(seconds), sorted({0, *checkpoints})
    times = [0.0, *accumulate(float(seconds[step]) for step in steps)]
    mean = times[-1] / len(steps) if steps else 0.0

    def estimate(step: int) -> float:
        start = max(start for start in starts if start <= step)
        first, last = bisect_left(steps, start), bisect_left(steps, step)
        num_missing = step - start - (last - first)  # updates without a row
        return times[last] - times[first] + mean * num_missing

    return estimate


def _average_windows(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, k + 1 - WINDOW) : k + 1] for k in range(len(values))]
    return [sum(window) / len(window) for window in windows]
