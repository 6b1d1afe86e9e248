"""What each example adds to an update: its gradient, seen while it is summed."""

from anybatch.ledger.ledger import Ledger, Observe
from anybatch.ledger.observe import Observed, observe

__all__ = ["Ledger", "Observe", "Observed", "observe"]
