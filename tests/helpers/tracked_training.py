"""Trains into a folder with all trackers, as a script of its own: python tracked_training.py RUN.

The first session ends after 4 updates; the second makes one more, which no checkpoint holds, and
the process is gone at once, as if it had been killed.
"""

import os
import sys

import torch

import anybatch as ab
from anybatch.runs.trackers import tracker_named
from small_training import start

NAMES = ("tensorboard", "mlflow", "wandb")


def sessions(folder: str) -> None:
    """Two sessions, the second of which does not end."""
    trackers = [tracker_named(name) for name in NAMES]
    from mlflow.telemetry import get_telemetry_client

    for stop in (4, 5):
        for step in start().loop(ab.Run(folder, trackers=trackers, checkpoint_every=2)):
            if step.step + 1 == stop == 5:
                assert get_telemetry_client() is None  # MLflow's, which takes a while to report
                os._exit(9)
            if step.step + 1 == stop:
                break


if __name__ == "__main__":
    torch.set_num_threads(1)
    sessions(sys.argv[1])
