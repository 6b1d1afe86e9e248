"""A run: a folder with its records and checkpoints.

    RUN/
        run.json          marks the folder as a run, with checksums of its files: see `checksums`
        lock              held by the one process that writes
        recipe.toml       the resolved recipe, where the command line made the run
        records.jsonl     see `records`
        checkpoints/      see `checkpoints`
        ledger/           see `ledger`, where one is kept
        tensorboard/ ...  what trackers write: see `trackers`

A resumed run goes on from its newest checkpoint that verifies; the records of later steps are
dropped, since these steps are made again, the same. Of several ranks the first alone writes, and
all read.
"""

import atexit
import logging
from collections.abc import Iterable, Mapping
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
from anybatch.training import checkpoints
from anybatch.training.checkpoints import Checkpoint, Scan
from anybatch.training.checksums import state_of
from anybatch.training.data_fingerprint import DATA, check_data, data_of_settings, no_fingerprint
from anybatch.training.digest import refuse_non_finite
from anybatch.training.environment import environment
from anybatch.training.folder import (
    adopt_checkpoint,
    claim,
    find_damage,
    is_run,
    replace_recipe,
)
from anybatch.training.ledger import LedgerFiles, columns_of
from anybatch.training.records import Records, are_numbers, read_records
from anybatch.training.settings import ENVIRONMENT, compare
from anybatch.training.smoothing import smoothed
from anybatch.training.state import TrainingState
from anybatch.training.trackers import Tracker
from anybatch.training.trackers.all import Trackers

__all__ = ["Run", "is_run", "read_records"]

_log = logging.getLogger(__name__)

_open_runs: WeakSet["Run"] = WeakSet()


class Run:
    """A run's folder, opened for writing.

    Args:
        folder: made if missing; if it is a run already, it is continued.
        checkpoint_every: updates between checkpoints; None: at the end of each epoch. The last
            update of a run is always checkpointed.
        keep: how many checkpoints stay, at least 2.
        settings: further settings that must not change on resume, as plain JSON.
        trackers: what else shows the numbers of the records; may change on resume.
        smoothing: s of the moving averages in the records, a <- s a + (1 - s) loss, of the loss
            and of each part of it, from 0 to under 1; may change on resume.
        group: the ranks that train together, each of which opens the run; None: this process
            alone.
        accept_environment: whether a bitwise run may go on where its bits may become others:
            other versions, processor, threads; what differs is kept in the records.
        accept_data: whether a run may go on with other data than those that it was trained on;
            what differs is kept in the records.
        recipe: text of the recipe.toml that a new run is to have; a folder that is a run already
            is then refused.

    Raises:
        RunError: a folder that holds something else, that another process writes into, or that
            cannot be written; what is no tracker; a smoothing out of range; CheckpointError:
            settings that are no plain JSON.
    """

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
        _check_counts(checkpoint_every, keep)
        _check_smoothing(smoothing)
        check_local(folder, "Run(folder)", RunError)
        self.group = group
        self._writes = distributed.rank_of(group) == 0
        self.folder = Path(folder)
        self.checkpoint_every = checkpoint_every
        self._keep = keep
        self._settings = checkpoints.plain(dict(settings or {}))
        self._smoothing = smoothing
        self._accepts = accept_environment
        self._accepts_data = accept_data
        self.data: Mapping[str, Any] | None = None  # fingerprint; None: `steps` computes it
        self.saved: int | None = None  # updates made until the newest checkpoint
        self._averages: Mapping[str, float] = {}
        self._ledger: LedgerFiles | None = None
        self._keeps_ledger = False
        with distributed.by_itself(group):
            self._trackers = Trackers(trackers)
            if self._writes:
                self._open(recipe)

    def _open(self, recipe: str | None) -> None:
        try:
            self._lock, self._checksums = claim(self.folder, recipe, self._trackers.places)
            self._damage = find_damage(self._checksums)
            self._records = Records(self.folder / "records.jsonl")
            _open_runs.add(self)
        except OSError as error:
            raise RunError(
                f"{self.folder}: expected a folder to write into, got: {error}. "
                f"Check its permissions and the disk, or use another folder."
            ) from error

    def begin(
        self,
        state: TrainingState,
        settings: Mapping[str, Any],
        *,
        keep_ledger: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Take up the newest good checkpoint, if there is one: the same on every rank.

        Args:
            state: restored in place.
            settings: what must be as it was, by name, as plain JSON.
            keep_ledger: whether `note` keeps what it is told.
            notes: what the record of this session is to say besides.

        Raises:
            RunError: a setting that differs from the checkpoint's, other data, or a ledger that
                cannot be written for want of pyarrow; CheckpointError: checkpoints of which none
                verifies.
        """
        if both := sorted(self._settings.keys() & {*settings, ENVIRONMENT}):
            raise RunError(
                f"Run(settings=...) has {both}, names that the loop itself compares: rename them."
            )
        self._settings |= checkpoints.plain(dict(settings))
        self._keeps_ledger = keep_ledger
        scan = distributed.of_first(self._scan, self.group)
        accepted: dict[str, Any] = {}
        with distributed.by_itself(self.group):
            if scan.found is not None:
                before, accepts = scan.found.settings, self._accepts
                accepted = self._compare_data(before)
                accepted |= compare(
                    self.folder,
                    before,
                    self._settings,
                    accept_environment=accepts,
                    accept=("order", "order_begins") if accepted else (),
                )
                state.restore(checkpoints.load(scan.found))
                state.num_updates = self.saved = scan.found.step
        with distributed.by_itself(self.group):
            if self._writes:
                self._begin_files(state.num_updates, scan, accepted, notes or {})

    def _compare_data(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the data with those of a checkpoint's settings; return what was accepted."""
        old, new = data_of_settings(before), data_of_settings(self._settings)
        if old is None or new is None:
            if self._writes and new is not None:
                _log.warning(no_fingerprint(self.folder))
            return {}
        try:
            found = check_data(self.folder, old, new, accept=self._accepts_data)
        except RunError:
            # Data that are computed differ where other instructions compute them: say that first.
            here = {**before, ENVIRONMENT: self._settings.get(ENVIRONMENT)}
            compare(self.folder, before, here, accept_environment=self._accepts)
            raise
        return {"data": found} if found else {}

    def _scan(self) -> Scan:
        scan = checkpoints.newest(self.folder / "checkpoints")
        if scan.refused:
            if scan.found is None:
                raise CheckpointError(scan.explain())
            _log.warning("continuing from an older checkpoint: %s", scan.explain())
        return scan

    def _begin_files(
        self,
        num_updates: int,
        scan: Scan,
        accepted: Mapping[str, Any],
        notes: Mapping[str, Any],
    ) -> None:
        """Take back what was written of later updates, and note that a session has begun."""
        if scan.found is not None:
            self._damage += adopt_checkpoint(self._checksums, scan.found.path)
        last = self._records.drop_from(num_updates, self._checksums.changing)
        averages: Any = last.get("averages")
        self._averages = averages if are_numbers(averages) else {}
        settings = {name: value for name, value in self._settings.items() if name != DATA}
        self._trackers.begin(self.folder, num_updates, settings)
        if self._keeps_ledger:
            self._ledger = LedgerFiles(self.folder / "ledger", self._checksums.changing)
            self._ledger.begin(num_updates)
        refused = [refused.reason for refused in scan.refused]
        session = {"kind": "session", "step": num_updates, "refused": refused}
        session |= {"ranks": distributed.num_ranks(self.group), **notes}
        if accepted:
            session |= {"accepted": dict(accepted)}
        if self._damage:
            session |= {"damaged": self._damage}
        self.record(session | environment(self.folder))
        self._damage = []  # it is recorded, and the run goes on with what was found
        recipe = self.folder / "recipe.toml"
        if recipe.exists():
            self._checksums.note(recipe, state_of(recipe))

    def _note_records(self) -> None:
        """Note the records as they are on the disk, for the next write of run.json."""
        if not self._damage:
            self._checksums.note(self.folder / "records.jsonl", self._records.state)

    def replace_recipe(self, text: str) -> None:
        """Put another recipe in place of the run's own: its free keys have changed."""
        replace_recipe(self._checksums, text)

    def note(self, step: int, epoch: int, gradient: Gradient) -> None:
        """Add the rows of an update to the ledger, if one is kept; on the disk as records are.

        To be called on every rank.
        """
        if not self._keeps_ledger:
            return
        told = distributed.everywhere(lambda: columns_of(step, epoch, gradient), self.group)
        if self._ledger is not None:
            self._ledger.add(step, told)

    def record(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is on the disk at the next checkpoint, or when the run is closed.

        Args:
            row: plain JSON with a "kind", and the "step" that it belongs to: that of `Step`. Moving
                averages are added to that of an update, and trackers get its numbers. Of several
                ranks that of the first counts.
        """
        if not self._writes:
            return
        if row.get("kind") == "step":
            losses = {**row.get("parts", {}), "loss": row.get("loss")}
            self._averages = smoothed(self._averages, losses, self._smoothing)
            row = {**row, "averages": self._averages}
        self._records.append(row)
        self._trackers.log(row)

    def checkpoint(self, state: TrainingState, dumped: dict[str, Any]) -> Checkpoint | None:
        """Write a verified checkpoint, the records first. To be called on every rank.

        Args:
            dumped: what `state.dump()` has given.

        Returns:
            It; None on a rank that does not write.

        Raises:
            CheckpointError: weights that are not finite, or a disk that refuses; RunError:
                records that the disk refuses, or a run that is closed.
        """
        if not self._writes:
            self.saved = state.num_updates
            return None
        self._records.flush()
        self._note_records()
        self._trackers.flush()
        if self._ledger is not None:
            self._ledger.flush()
        weights = [
            name for name, _ in unwrap(state.model).named_parameters() if name in dumped["model"]
        ]
        refuse_non_finite({"model": {name: dumped["model"][name] for name in weights}})
        written = checkpoints.write(
            self.folder / "checkpoints",
            step=state.num_updates,
            state=dumped,
            settings=self._settings,
            keep=self._keep,
            changing=self._checksums.changing,
        )
        self.saved = written.step
        return written

    def close(self) -> None:
        """Let other processes write. Rows since the last checkpoint are lost on a full disk."""
        if self not in _open_runs:  # closed already, or another rank writes
            return
        _open_runs.discard(self)
        self._records.close()
        try:
            self._trackers.close()
            if self._ledger is not None:
                self._ledger.flush()
            self._note_records()
            with suppress(OSError):  # a full disk: run.json lists what is there in any case
                self._checksums.write()
        finally:
            self._lock.close()


@atexit.register
def _close_runs() -> None:
    """Close runs whose loop was left before its end, while Python can still do so."""
    for run in list(_open_runs):
        run.close()


def _check_counts(checkpoint_every: int | None, keep: int) -> None:
    for name, given, least in (("checkpoint_every", checkpoint_every, 1), ("keep", keep, 2)):
        if given is not None and (type(given) is not int or given < least):
            raise RunError(f"expected {name} to be an integer of at least {least}, got {given!r}.")


def _check_smoothing(smoothing: float) -> None:
    if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
        raise RunError(f"expected smoothing to be a number from 0 to under 1, got {smoothing!r}.")
