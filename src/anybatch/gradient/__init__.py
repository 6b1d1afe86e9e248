"""From a share of a batch to the gradient of its update."""

from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.compute import batch_gradient
from anybatch.gradient.result import Gradient

__all__ = ["ClipExamples", "ClipNorm", "Gradient", "batch_gradient"]
