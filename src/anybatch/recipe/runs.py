"""A run of a recipe: begun, continued, trained.

    recipe -> build -> begun(...) or reopened(...) -> train

Building writes nothing, so what is wrong with a recipe is found before there is a run.
"""

import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import DivergenceError, RunError
from anybatch.recipe.build import Built, Part
from anybatch.recipe.code import check_code, code_of, may_import
from anybatch.recipe.failures import advise_on_divergence, describe_rest, refuse_divergence
from anybatch.recipe.files import find, fingerprint, read, text_of, with_changes
from anybatch.recipe.names import names_code
from anybatch.recipe.scaling import tell
from anybatch.recipe.schema import Recipe
from anybatch.recipe.stopping import Stopping
from anybatch.training import checkpoints
from anybatch.training.checkpoints import Checkpoint, Scan
from anybatch.training.data_fingerprint import check_data, data_of_settings, no_fingerprint
from anybatch.training.disk import check_file
from anybatch.training.evaluation import Evaluation
from anybatch.training.records import read_recipe_records
from anybatch.training.run import Run, is_run
from anybatch.training.state import Stateful
from anybatch.training.steps import Step, steps
from anybatch.training.trackers import tracker_named

__all__ = [
    "Progress",
    "begun",
    "carried",
    "changed",
    "check_run",
    "compare_data",
    "newest",
    "read_recipe",
    "recipe_of",
    "reopened",
    "train",
]

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


def read_recipe(name: str, changes: Sequence[str], *, allow_code: bool) -> tuple[Recipe, str, bool]:
    """A recipe to begin a run with: the recipe, its name, and whether its code may be imported.

    See `anybatch.recipe.code` for which code may be imported.

    Raises:
        RecipeError: a recipe that cannot be read, or that names code from elsewhere.
    """
    path = find(name)
    folders = (*path.absolute().parents, *path.resolve().parents)
    run = next((folder for folder in folders if is_run(folder)), None)
    name = path.parent.name if path.stem == "recipe" and path.parent.name else path.stem
    recipe = read(path, changes)
    if run is not None:
        return recipe, name, may_import(run, recipe, allow_code=allow_code)
    check_code(path.absolute().parent, recipe, allow_code=allow_code)
    return recipe, name, True


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        RunError: no run, or one without a recipe.
    """
    check_run(folder)
    check_file(folder / "recipe.toml")
    if not (folder / "recipe.toml").exists():
        raise RunError(
            f"{folder} has no recipe.toml. If a script made it, only that script can build its "
            f"model: run it again to continue, and call ab.evaluate there to evaluate. These work "
            f"on it: anybatch show, examples, verify. If 'anybatch train' was stopped as it made "
            f"the folder, begin again: anybatch train RECIPE --out {folder}"
        )
    return read(folder / "recipe.toml")


def check_run(folder: Path) -> None:
    """See that a folder is a run.

    Raises:
        RunError: it is none.
    """
    if not is_run(folder):
        raise RunError(
            f"{folder} is no run, expected a folder that 'anybatch train' has made, with run.json "
            f"and recipe.toml in it."
        )


def changed(folder: Path, changes: Sequence[str]) -> Recipe:
    """The recipe of a run with some of its free keys changed; nothing is written.

    Raises:
        RunError: no run; RecipeError: a key that changes arithmetic.
    """
    return with_changes(recipe_of(folder), changes)


@contextmanager
def begun(recipe: Recipe, folder: Path, group: ProcessGroup | None = None) -> Iterator[Run]:
    """A new run of a recipe; its folder stays only if an update is made.

    Raises:
        RunError: a folder that exists.
    """
    is_first = distributed.rank_of(group) == 0
    with closing(_open(recipe, folder, group, is_new=True)) as run:
        try:
            yield run
        except BaseException as error:
            run.close()
            if is_first and _first_loss(folder) is None:
                _remove(folder)
            elif is_first and isinstance(error, Exception):
                error.add_note(describe_rest(folder))
            raise


@contextmanager
def reopened(
    built: Built,
    folder: Path,
    group: ProcessGroup | None = None,
    *,
    accept_environment: bool = False,
    accept_data: bool = False,
) -> Iterator[Run]:
    """A run to be continued; free keys that have changed are recorded.

    Args:
        accept_environment, accept_data: see `Run`.

    Raises:
        RunError: another recipe than the run's, or more updates made than the recipe asks for.
    """
    accepts = {"accept_environment": accept_environment, "accept_data": accept_data}
    with closing(_open(built.recipe, folder, group, **accepts)) as run:
        with distributed.by_itself(group):
            if distributed.rank_of(group) == 0:
                _prepare(built, folder, run, accept_data=accept_data)
        try:
            yield run
        except Exception as error:
            run.close()
            error.add_note(describe_rest(folder))
            raise


def _prepare(built: Built, folder: Path, run: Run, *, accept_data: bool) -> None:
    """See that a run can go on with this recipe, which is then its own."""
    found = newest(folder, built.recipe).found
    if found is not None and data_of_settings(found.settings) is not None:
        compare_data(folder, found, built, accept=accept_data)  # before anything is written
    made, epochs = 0 if found is None else found.step, built.recipe.run.epochs
    if made > built.order.num_steps(epochs):
        raise RunError(
            f"{folder} has made {made} updates, more than the {built.order.num_steps(epochs)} "
            f"of run.epochs = {epochs}: expected as many epochs or more."
        )
    if built.recipe != recipe_of(folder):
        text = text_of(built.recipe)
        run.replace_recipe(text)
        run.record({"kind": "session", "step": made, "recipe": text})


def compare_data(folder: Path, checkpoint: Checkpoint, built: Built, *, accept: bool) -> None:
    """Compare the data that were loaded with those that a checkpoint was trained on.

    Raises:
        RunError: other data, and they are not accepted.
    """
    before = data_of_settings(checkpoint.settings)
    if before is None:
        _log.warning(no_fingerprint(folder))
        return
    for difference in check_data(folder, before, built.data_fingerprint, accept=accept):
        _log.warning("other data than the run's are accepted: %s", difference)


def newest(folder: Path, recipe: Recipe) -> Scan:
    """A run's newest good checkpoint, if there is one, seen to be of that recipe.

    Raises:
        RunError: a checkpoint of another recipe.
    """
    scan = checkpoints.newest(folder / "checkpoints")
    if scan.found is not None and scan.found.settings.get("recipe") != fingerprint(recipe):
        raise RunError(
            f"{folder / 'recipe.toml'} is not the recipe that {scan.found.path.name} was made "
            f"with: was it edited? Put it back, or begin a new run."
        )
    return scan


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
    first = distributed.of_first(lambda: _first_loss(run.folder), run.group)
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


def _open(
    recipe: Recipe,
    folder: Path,
    group: ProcessGroup | None,
    *,
    is_new: bool = False,
    **accepts: bool,
) -> Run:
    with distributed.by_itself(group):
        names = recipe.track.to if distributed.rank_of(group) == 0 else []
        trackers = [tracker_named(name) for name in names]
    return Run(
        folder,
        checkpoint_every=recipe.run.checkpoint_every,
        keep=recipe.run.keep,
        trackers=trackers,
        smoothing=recipe.track.smoothing,
        settings={"recipe": fingerprint(recipe)},
        group=group,
        recipe=text_of(recipe) if is_new else None,
        **accepts,
    )


def _first_loss(folder: Path) -> float | None:
    """Return the loss of a run's first update, nan if it was not finite; None without updates."""
    rows = read_recipe_records(folder / "records.jsonl")
    losses = (row["loss"] for row in rows if row["kind"] == "step")
    return next((math.nan if loss is None else float(loss) for loss in losses), None)


def _remove(folder: Path) -> None:
    """Take back what `begun` has made, and only that."""
    for name in ("records.jsonl", "recipe.toml", "run.json", "lock"):  # so a run or begun, if cut
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it
        folder.rmdir()
