"""A run: the folder of a training, with its records and checkpoints.

    RUN/
        run.json          marks the folder as a run, with checksums of its files: see `checksums`
        lock              locked by the one process that writes
        recipe.toml       the resolved recipe, if the command line made the run
        records.jsonl     see `records`
        checkpoints/      see `checkpoints`
        ledger/           see `ledger_files`, if the training is observed
        tensorboard/ ...  files of trackers: see `trackers`

A resumed run continues from its newest checkpoint that verifies. The records of later steps are
dropped, since these steps are made again with the same result. Only the first rank writes, and all
ranks read.
"""

import atexit
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from anybatch import distributed
from anybatch.compiled import unwrap
from anybatch.distributed import ProcessGroup
from anybatch.errors import CheckpointError, RunError
from anybatch.gradient import Gradient
from anybatch.gradient.arguments import check_arguments
from anybatch.paths import check_local
from anybatch.runs import checkpoints
from anybatch.runs.checkpoints import Checkpoint, Scan
from anybatch.runs.checksums import read_file_state
from anybatch.runs.data_fingerprint import (
    DATA,
    check_data,
    describe_missing_fingerprint,
    get_fingerprint,
)
from anybatch.runs.digest import refuse_non_finite
from anybatch.runs.environment import describe_environment
from anybatch.runs.folder import adopt_checkpoint, claim_folder, find_damage, replace_recipe
from anybatch.runs.ledger_files import LedgerFiles, make_columns
from anybatch.runs.own_state import OwnState
from anybatch.runs.records import Records, are_numbers, smooth_averages
from anybatch.runs.settings import ENVIRONMENT, compare_settings
from anybatch.runs.state import TrainingState
from anybatch.runs.trackers.protocol import Tracker, Trackers

__all__ = ["RunFiles"]

_log = logging.getLogger(__name__)

_open_runs: WeakSet["RunFiles"] = WeakSet()


class RunFiles:
    """Folder of a run, open for writing; see `Run` for arguments and errors."""

    @check_arguments
    def __init__(
        self,
        folder: str | Path,
        *,
        checkpoint_every: int | None = None,
        keep: int = 2,
        settings: Mapping[str, Any] | None = None,
        trackers: Iterable[Tracker] = (),
        smoothing: float = 0.9,
        group: ProcessGroup | None = None,
        accept_environment: bool = False,
        accept_data: bool = False,
        recipe: str | None = None,
    ) -> None:
        _check_arguments(checkpoint_every, keep, smoothing)
        check_local(folder, "Run(folder)", RunError)
        self.group = group
        self._writes = distributed.get_rank(group) == 0
        self.folder = Path(folder)
        self.checkpoint_every = checkpoint_every
        self._keep = keep
        self._settings = checkpoints.check_settings(dict(settings or {}))
        self._smoothing = smoothing
        self._accept_environment = accept_environment
        self._accept_data = accept_data
        self.data: Mapping[str, Any] | None = None  # fingerprint; None: `steps` computes it
        self.saved: int | None = None  # updates until the newest checkpoint
        self._averages: Mapping[str, float] = {}
        self._ledger: LedgerFiles | None = None
        self._has_ledger = False
        with distributed.raise_together(group):
            self._trackers = Trackers(trackers)
            if self._writes:
                self._open(recipe)

    def _open(self, recipe: str | None) -> None:
        try:
            self._lock, self._checksums = claim_folder(self.folder, recipe, self._trackers.places)
            try:
                self._damage = find_damage(self._checksums)
                self._records = Records(self.folder / "records.jsonl")
            except BaseException:
                self._lock.close()
                raise
            _open_runs.add(self)
        except OSError as error:
            raise RunError(
                f"{self.folder} is no folder to write into: {error}. "
                f"Check its permissions and the disk, or use another folder."
            ) from error

    def begin(
        self,
        state: TrainingState | OwnState,
        settings: Mapping[str, Any],
        *,
        has_ledger: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Restore the newest good checkpoint, if there is one: the same on every rank.

        Args:
            state: restored in place.
            settings: what must not have changed, by name, as plain JSON.
            has_ledger: whether the run writes a ledger.
            notes: further entries in the record of this session.

        Raises:
            RunError: a setting or the data differ from the checkpoint's, or a ledger is asked for
                without pyarrow. CheckpointError: there are checkpoints, and none verifies.
        """
        if both := sorted(self._settings.keys() & {*settings, ENVIRONMENT}):
            raise RunError(
                f"Run(settings=...) has {both}, names that the loop itself compares: rename them."
            )
        self._settings |= checkpoints.check_settings(dict(settings))
        self._has_ledger = has_ledger
        scan = distributed.broadcast_from_first(self._find_checkpoint, self.group)
        accepted: dict[str, Any] = {}
        with distributed.raise_together(self.group):
            if scan.checkpoint is not None:
                before = scan.checkpoint.settings
                accepted = self._compare_data(before)
                accepted |= compare_settings(
                    self.folder,
                    before,
                    self._settings,
                    accept_environment=self._accept_environment,
                    accept=("order", "order_begins") if accepted else (),
                )
                state.restore(checkpoints.load(scan.checkpoint))
                state.num_updates = self.saved = scan.checkpoint.step
        with distributed.raise_together(self.group):
            if self._writes:
                self._begin_files(state.num_updates, scan, accepted, notes or {})

    def _compare_data(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the data with the fingerprint in a checkpoint; return accepted differences."""
        old, new = get_fingerprint(before), get_fingerprint(self._settings)
        if old is None or new is None:
            if self._writes and new is not None:
                _log.warning(describe_missing_fingerprint(self.folder))
            return {}
        try:
            differences = check_data(self.folder, old, new, accept=self._accept_data)
        except RunError:
            # Another processor may compute other data. Then the environment is the cause to name.
            here = {**before, ENVIRONMENT: self._settings.get(ENVIRONMENT)}
            compare_settings(self.folder, before, here, accept_environment=self._accept_environment)
            raise
        return {"data": differences} if differences else {}

    def count_updates(self) -> int:
        """Count the updates up to the newest checkpoint that verifies; 0: there is none."""
        checkpoint = checkpoints.find_newest(self.folder / "checkpoints").checkpoint
        return 0 if checkpoint is None else checkpoint.step

    def _find_checkpoint(self) -> Scan:
        scan = checkpoints.find_newest(self.folder / "checkpoints")
        if scan.refusals:
            if scan.checkpoint is None:
                raise CheckpointError(scan.explain())
            _log.warning("continuing from an older checkpoint: %s", scan.explain())
        return scan

    def _begin_files(
        self, num_updates: int, scan: Scan, accepted: Mapping[str, Any], notes: Mapping[str, Any]
    ) -> None:
        """Drop what was written about later updates, and record that a session begins."""
        if scan.checkpoint is not None:
            self._damage += adopt_checkpoint(self._checksums, scan.checkpoint.path)
        last = self._records.drop_from(num_updates, self._checksums.announce)
        averages: Any = last.get("averages")
        self._averages = averages if are_numbers(averages) else {}
        settings = {name: value for name, value in self._settings.items() if name != DATA}
        self._trackers.begin(self.folder, num_updates, settings)
        if self._has_ledger:
            self.open_ledger(num_updates)
        refused = [refusal.reason for refusal in scan.refusals]
        session = {"kind": "session", "step": num_updates, "refused": refused}
        session |= {"ranks": distributed.get_num_ranks(self.group), **notes}
        if accepted:
            session |= {"accepted": dict(accepted)}
        if self._damage:
            session |= {"damaged": self._damage}
        self.record(session | describe_environment(self.folder))
        self._damage = []  # the records name it now, and the run continues with these files
        recipe = self.folder / "recipe.toml"
        if recipe.exists():
            self._checksums.set_state(recipe, read_file_state(recipe))

    def _update_checksums(self) -> None:
        """List the records as they are on the disk, for the next write of run.json."""
        if not self._damage:
            self._checksums.set_state(self.folder / "records.jsonl", self._records.state)

    def replace_recipe(self, text: str) -> None:
        """Replace the recipe of the run after a change of its free keys."""
        replace_recipe(self._checksums, text)

    def open_ledger(self, step: int) -> None:
        """Open the ledger before an update, unless it is open; its later rows are dropped."""
        self._has_ledger = True
        if self._writes and self._ledger is None:
            self._ledger = LedgerFiles(self.folder / "ledger", self._checksums.announce)
            self._ledger.begin(step)

    def add_to_ledger(self, step: int, epoch: int, gradient: Gradient) -> None:
        """Add the rows of an update to the ledger, if the run has one; call it on every rank."""
        if not self._has_ledger:
            return
        shares = distributed.all_gather_object(
            lambda: make_columns(step, epoch, gradient), self.group
        )
        if self._ledger is not None:
            self._ledger.add(step, shares)

    def read_norms(self, ids: Sequence[int]) -> dict[int, list[float]]:
        """Read the norms that examples had at their earlier visits, by id; {} without a ledger."""
        return {} if self._ledger is None else self._ledger.read_norms(ids)

    def record(self, row: Mapping[str, Any]) -> None:
        """Append one row; see `Run.record`."""
        if not self._writes:
            return
        if row.get("kind") == "step":
            row = self._add_averages(row)
        self._records.append(row)
        self._trackers.log(row)

    def record_update(self, row: Mapping[str, Any]) -> None:
        """Append the row of an update, which nobody changes any more."""
        if self._writes:
            row = self._add_averages(row)
            self._records.append_later(row)
            self._trackers.log(row)

    def _add_averages(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        losses = {**row.get("parts", {}), "loss": row.get("loss")}
        self._averages = smooth_averages(self._averages, losses, self._smoothing)
        return {**row, "averages": self._averages}

    def write_checkpoint(
        self, state: TrainingState | OwnState, content: dict[str, Any]
    ) -> Checkpoint | None:
        """Write the records and a verified checkpoint; to be called on every rank.

        Args:
            content: what `state.dump()` has returned.

        Returns:
            The checkpoint; None on a rank that does not write.

        Raises:
            CheckpointError: weights are not finite, or the disk refuses. RunError: the disk refuses
                the records, or the run is closed.
        """
        if not self._writes:
            self.saved = state.num_updates
            return None
        self._records.flush()
        self._update_checksums()
        self._trackers.flush()
        if self._ledger is not None:
            self._ledger.flush()
        if isinstance(state, OwnState):
            refuse_non_finite({"state": state.list_parameters()})
        else:
            names = [name for name, _ in unwrap(state.model).named_parameters()]
            model = content["model"]
            refuse_non_finite({"model": {name: model[name] for name in names if name in model}})
        checkpoint = checkpoints.write(
            self.folder / "checkpoints",
            step=state.num_updates,
            state=content,
            settings=self._settings,
            keep=self._keep,
            announce=self._checksums.announce,
        )
        self.saved = checkpoint.step
        return checkpoint

    def close(self) -> None:
        """Close the run for other processes. Rows that do not fit on a full disk are lost."""
        if self not in _open_runs:  # it is closed, or another rank writes
            return
        _open_runs.discard(self)
        self._records.close()
        try:
            self._trackers.close()
            if self._ledger is not None:
                self._ledger.flush()
            self._update_checksums()
            with suppress(OSError):  # a full disk; run.json lists all files already
                self._checksums.write()
        finally:
            self._lock.close()


@atexit.register
def _close_runs() -> None:
    """Close runs whose loop was left early, while Python can still do so."""
    for run in list(_open_runs):
        run.close()


def _check_arguments(checkpoint_every: int | None, keep: int, smoothing: float) -> None:
    for name, value, least in (("checkpoint_every", checkpoint_every, 1), ("keep", keep, 2)):
        if value is not None and (type(value) is not int or value < least):
            raise RunError(f"{name} is {value!r}. It must be an integer of at least {least}.")
    if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
        raise RunError(f"smoothing is {smoothing!r}. It must be a number from 0 to under 1.")
