"""What a run says of the numbers that were carried to its batch size."""

import logging

from anybatch import distributed
from anybatch.recipe.scaling.changes import Carried
from anybatch.recipe.schema import BatchSection
from anybatch.runs.run import Run

__all__ = ["tell"]

_log = logging.getLogger(__name__)


def tell(carried: Carried | None, batch: BatchSection, run: Run, *, is_new: bool) -> None:
    """Show, and record with a new run, the numbers that differ from those stated; of several ranks
    the first does."""
    if carried is None:
        return
    changes = [change for change in carried.changes if change.key != "batch.size"]
    if is_new:
        numbers = {change.key: [change.old, change.new] for change in changes}
        row = {"kind": "session", "step": 0, "carried": numbers, "rule": carried.rule}
        run.record(row | {"warnings": carried.warnings})
    if distributed.rank_of(run.group) != 0:
        return
    words = "; ".join(f"{change.key} {change.old} -> {change.new}" for change in changes)
    _log.warning(
        f"carried from batch.reference_size = {batch.reference_size} to batch.size = "
        f"{batch.size} by {carried.rule}: {words or 'nothing changes'}"
    )
    for warning in carried.warnings if is_new else ():
        _log.warning(warning)
