"""Trackers show a run in TensorBoard, MLflow or Weights & Biases.

| name | files below the run's folder | to look at them |
|---|---|---|
| tensorboard | tensorboard/ | tensorboard --logdir RUN |
| mlflow | mlflow.db | mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db (of `mlflow` itself) |
| wandb | wandb/ | wandb sync RUN/wandb/offline-run-* |

Each shows the numbers of the records by name: "loss", "parts/data", "averages/data", "lr",
"metrics/accuracy", "held_out/loss". None uses the network. Steps that a resumed run makes
again appear once. The records do not depend on trackers: one that fails is left out with a warning.
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
    """Create a tracker for `Run(trackers=[...])`.

    Raises:
        RunError: there is no such tracker, or its package is not installed.
    """
    if name not in _trackers:
        raise RunError(f"there is no tracker {name!r}. Choose one of {', '.join(_trackers)}.")
    return _trackers[name]()
