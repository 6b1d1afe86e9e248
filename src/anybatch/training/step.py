"""Result of one update, which `steps` passes to the body of the loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anybatch.gradient import Gradient
from anybatch.runs.checkpoints import Checkpoint
from anybatch.runs.run import Run
from anybatch.training.spikes import Spike

__all__ = ["Step", "is_due"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update, after it was made.

    >>> import torch
    >>> import anybatch as ab
    >>> model = torch.nn.Linear(3, 1)
    >>> def losses(model, batch):
    ...     return (model(batch[0])[:, 0] - batch[1]) ** 2
    >>> sgd, data = torch.optim.SGD(model.parameters(), lr=0.1), (torch.rand(8, 3), torch.rand(8))
    >>> order = ab.Order(8, batch_size=4, seed=0)
    >>> step = next(ab.steps(model, ab.Objective(losses), sgd, data, order=order, epochs=1))
    >>> step.step, step.epoch, step.examples, step.lr, step.is_skipped
    (0, 0, 4, 0.1, False)
    """

    step: int  # its number, from 0
    epoch: int  # of its first example
    examples: int  # used so far, this update's included
    loss: float  # R + Omega before the update
    parts: Mapping[str, float]  # each term and penalty by name
    metrics: Mapping[str, float]  # over the batch, before the update
    lr: float  # of the first parameter group
    is_skipped: bool  # the gradient was not finite: weights, buffers and states did not change
    seconds: float  # from reading the batch to the end of the update
    ends_epoch: bool  # whether this is the last update of its epoch
    gradient: Gradient
    spike: Spike | None = None  # with `steps(spikes=...)`, if this update is one
    save: Callable[[], Checkpoint | None]
    """Checkpoint now, out of turn: call it last in the body, on every rank. Returns None on a rank
    that does not write."""

    def record_in(self, run: Run) -> None:
        """Record this update in a run, and its spike if there is one."""
        run.record_update(self.make_row())
        if self.spike is not None:
            run.record(self.spike.make_row())

    def make_row(self) -> dict[str, Any]:
        """Build the row of this update for the records."""
        row: dict[str, Any] = {
            "kind": "step",
            "step": self.step,
            "epoch": self.epoch,
            "examples": self.examples,
            "loss": self.loss,
            "parts": dict(self.parts),
            "metrics": dict(self.metrics),
            "lr": self.lr,
            "seconds": round(self.seconds, 6),
        }
        return row | {"skipped": True} if self.is_skipped else row


def is_due(step: Step, every: int | None, total: int) -> bool:
    """Return whether to checkpoint after this step."""
    num_updates = step.step + 1
    return num_updates == total or (step.ends_epoch if every is None else num_updates % every == 0)
