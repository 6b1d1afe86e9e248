"""Compute the gradient of an update from a share of its batch."""

from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.compute import batch_gradient
from anybatch.gradient.result import Gradient

__all__ = ["ClipExamples", "ClipNorm", "Gradient", "batch_gradient"]
