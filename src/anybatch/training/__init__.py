"""Training: updates in order, evaluation, and runs that survive."""

from anybatch.training.adascale import AdaScale
from anybatch.training.averages import Average
from anybatch.training.batches import Batch, batches
from anybatch.training.evaluation import Evaluation, evaluate
from anybatch.training.run import Run
from anybatch.training.steps import Step, steps

__all__ = [
    "AdaScale",
    "Average",
    "Batch",
    "Evaluation",
    "Run",
    "Step",
    "batches",
    "evaluate",
    "steps",
]
