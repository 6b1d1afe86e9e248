"""Audits of training steps that were not written with anybatch."""

from anybatch.audit.invariance import assert_layout_invariant

__all__ = ["assert_layout_invariant"]
