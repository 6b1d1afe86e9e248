"""Training: updates in order, and evaluation."""

from anybatch.training.batches import Batch, batches
from anybatch.training.evaluation import Evaluation, evaluate
from anybatch.training.loop import Step, steps

__all__ = ["Batch", "Evaluation", "Step", "batches", "evaluate", "steps"]
