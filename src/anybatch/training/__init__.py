"""Training: updates in order, and evaluation."""

from anybatch.training.batches import Batch, batches
from anybatch.training.evaluation import Evaluation, evaluate
from anybatch.training.loop import Step, steps
from anybatch.training.spikes import Spike, SpikeExample, SpikeWatch

__all__ = [
    "Batch",
    "Evaluation",
    "Spike",
    "SpikeExample",
    "SpikeWatch",
    "Step",
    "batches",
    "evaluate",
    "steps",
]
