"""The modes of the ledger that are entered."""

from anybatch._torch import function_modes
from anybatch.ledger.intercept import Intercept

__all__ = ["active_modes"]


def active_modes() -> list[Intercept]:
    """List the modes that are entered, the innermost last."""
    stack = function_modes()
    return [mode for mode in stack if isinstance(mode, Intercept)]
