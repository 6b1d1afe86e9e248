"""Audit training steps that somebody else has written.

layouts    assert_layout_invariant: is the gradient the same however a batch is cut?
weights    weigh: the weight that a step gives each example; check: a report over many layouts
"""

from anybatch.audit.layouts import assert_layout_invariant
from anybatch.audit.weights import Finding, Report, Weights, check, weigh

__all__ = ["Finding", "Report", "Weights", "assert_layout_invariant", "check", "weigh"]
