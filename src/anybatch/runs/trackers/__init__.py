"""Trackers: where to look at a run beside its records.

| name | files below the run's folder | to look at them |
|---|---|---|
| tensorboard | tensorboard/ | tensorboard --logdir RUN |
| mlflow | mlflow.db | mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db (of `mlflow` itself) |
| wandb | wandb/ | wandb sync RUN/wandb/offline-run-* |

Each shows the numbers of the records by name: "loss", "parts/data", "averages/data", "lr",
"metrics/accuracy", "held_out/loss". None uses the network. What a resumed run makes again is in
each of them once. The records do not depend on them: one that fails is left out with a warning.
"""

from collections.abc import Callable

from anybatch.errors import RunError
from anybatch.runs.trackers.mlflow import MLflow
from anybatch.runs.trackers.protocol import Tracker
from anybatch.runs.trackers.tensorboard import TensorBoard
from anybatch.runs.trackers.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "Tracker", "WandB", "tracker_named"]

_trackers: dict[str, Callable[[], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def tracker_named(name: str) -> Tracker:
    """A tracker for `Run(trackers=[...])`.

    Raises:
        RunError: a name that is none of these, or a package that is not installed.
    """
    if name not in _trackers:
        raise RunError(f"there is no tracker {name!r}, expected one of {', '.join(_trackers)}.")
    return _trackers[name]()
