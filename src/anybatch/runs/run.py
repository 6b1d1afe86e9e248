"""A run that the user opens: for `steps`, or for a loop of one's own."""

from collections.abc import Mapping
from typing import Any, final

from anybatch import distributed
from anybatch.errors import RunError
from anybatch.gradient import Gradient
from anybatch.runs.checkpoints import Checkpoint
from anybatch.runs.data_fingerprint import DATA, compute_fingerprint
from anybatch.runs.folder import is_run
from anybatch.runs.own_state import OwnState, check_step, make_row
from anybatch.runs.records import read_records
from anybatch.runs.run_files import RunFiles

__all__ = ["Run", "is_run", "read_records"]


@final
class Run(RunFiles):
    """Folder of a run, open for writing.

        >>> import tempfile
        >>> import anybatch as ab
        >>> run = ab.Run(tempfile.mkdtemp() + "/first", checkpoint_every=100)
        >>> run.record({"kind": "note", "step": 0, "text": "warm-up ends"})
        >>> run.close()

    Args:
        folder: made if missing; if it is a run already, it is continued.
        checkpoint_every: updates between checkpoints; None: at the end of each epoch. The last
            update of a run is always checkpointed.
        keep: how many checkpoints stay, at least 2.
        settings: further settings that must not change on resume, as plain JSON.
        trackers: programs that show the numbers of the records; may change on resume.
        smoothing: s of the moving averages in the records, a <- s a + (1 - s) loss, of the loss
            and of each part of it, from 0 to under 1; may change on resume.
        group: the ranks that train together, each of which opens the run; None: this process
            alone.
        accept_environment: whether a bitwise run may continue with other versions, processor or
            threads, which may change its bits; the records list the differences.
        accept_data: whether a run may continue with other data than it was trained on; the records
            list the differences.
        recipe: text of the recipe.toml for a new run; a folder that is a run already is refused.

    Raises:
        RunError: the folder holds something else, another process writes into it, or it cannot be
            written; an object is no tracker; or the smoothing is out of range. CheckpointError:
            the settings are no plain JSON.
    """

    _loop_state: OwnState | None = None  # of a loop of one's own

    def resume(self, state: Mapping[str, Any], *, data: Any = None) -> int:
        """Begin a loop of one's own: restore the newest good checkpoint, if there is one.

            >>> import tempfile, torch
            >>> import anybatch as ab
            >>> model = torch.nn.Linear(2, 1)
            >>> objective = ab.Objective(lambda model, x: model(x)[:, 0] ** 2)
            >>> state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
            >>> run = ab.Run(tempfile.mkdtemp() + "/own")
            >>> for t in range(run.resume(state=state), 3):
            ...     gradient = ab.batch_gradient(model, objective, torch.ones(4, 2))
            ...     state["optimizer"].step()
            ...     run.record(gradient, step=t)
            >>> run.checkpoint(state=state).step
            3
            >>> run.close()

        Args:
            state: what the loop changes, by name: models, optimisers, generators and the like, as
                for `steps`. It is restored in place.
            data: a data set, to refuse another one at the next resume; None: it is not compared.

        Returns:
            Number of updates that are made already.

        Raises:
            RunError: the checkpoint is of another state, or the data or a setting differ.
                CheckpointError: there are checkpoints, and none verifies.
        """
        current = OwnState(state)
        settings: dict[str, Any] = {"loop": "own", "state": sorted(map(str, state))}
        if data is not None:
            settings[DATA] = distributed.call_together(
                lambda: compute_fingerprint(data), self.group
            )
        self.begin(current, settings, has_ledger=(self.folder / "ledger").exists())
        self._loop_state = current
        return current.num_updates

    def record(
        self,
        row: Mapping[str, Any] | Gradient,
        *,
        step: int | None = None,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Append one row; it is on the disk at the next checkpoint, or when the run is closed.

        Args:
            row: the `Gradient` of an update in a loop of one's own, which adds to the ledger too;
                call it on every rank. Or plain JSON with a "kind", and the "step" that it belongs
                to: that of `Step`. Moving averages are added to the row of an update, and trackers
                get its numbers. Only the row of the first rank counts.
            step: number of the update, from 0; needed with a gradient.
            epoch: of the update.
            metrics: further figures of the update, by name.

        Raises:
            RunError: `resume` has not been called, or the step is recorded already.
        """
        if isinstance(row, Gradient):
            row = self._take(row, step, epoch, metrics or {})
        super().record(row)

    def _take(
        self, gradient: Gradient, step: int | None, epoch: int, metrics: Mapping[str, float]
    ) -> dict[str, Any]:
        """Add an update of a loop of the user's to the ledger, and make its row."""
        if self._loop_state is None:
            raise RunError(
                "run.record(gradient) comes after run.resume(state=...), which restores what the "
                "run has, and returns the number of the first update to make."
            )
        current = self._loop_state
        step = check_step(step, current.num_updates)
        if gradient.ledger is not None:
            self.open_ledger(step)
        self.add_to_ledger(step, epoch, gradient)
        current.num_updates, current.num_examples = (
            step + 1,
            current.num_examples + gradient.num_examples,
        )
        return make_row(gradient, step, epoch, current.num_examples, metrics)

    def checkpoint(self, state: Mapping[str, Any]) -> Checkpoint | None:
        """Write the records and a checkpoint of the state after the last update; on every rank.

        Args:
            state: the same objects as in `resume`.

        Returns:
            The checkpoint; None on a rank that does not write.

        Raises:
            RunError: other objects than in `resume`, or one that cannot be saved. CheckpointError:
                weights are not finite, or the disk refuses.
        """
        current = self._loop_state
        if current is None or state.keys() != current.objects.keys():
            names = "no state" if current is None else f"the state {sorted(current.objects)}"
            raise RunError(
                f"run.checkpoint(state=...) got {sorted(state)}, and run.resume(state=...) got "
                f"{names}. Pass both the same objects."
            )
        now = OwnState(state)  # perhaps other objects of the same names
        now.num_updates, now.num_examples = current.num_updates, current.num_examples
        self._loop_state = now
        return self.write_checkpoint(now, now.dump())
