"""What each example adds to an update: its gradient, seen while it is summed."""

from anybatch.ledger.observe import Observed, observe
from anybatch.ledger.quantities import Ledger, Observe

__all__ = ["Ledger", "Observe", "Observed", "observe"]
