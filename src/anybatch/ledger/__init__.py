"""Gradients that each example adds to an update, observed while they are summed."""

from anybatch.ledger.ledger import Ledger, Observe
from anybatch.ledger.observe import Observed, observe

__all__ = ["Ledger", "Observe", "Observed", "observe"]
