"""Runs: folders that hold the checkpoints and records of a training."""

from anybatch.runs.run import Run

__all__ = ["Run"]
