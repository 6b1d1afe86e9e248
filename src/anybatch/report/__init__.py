"""A run or a batch turned into one self-contained HTML page."""

from anybatch.report.explain import Explanation, explain

__all__ = ["Explanation", "explain"]
