"""The modes of the ledger that are entered."""

from torch.overrides import _get_current_function_mode_stack

from anybatch.ledger.intercept import Intercept

__all__ = ["active_modes"]


def active_modes() -> list[Intercept]:
    """List the modes that are entered, the innermost last."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [mode for mode in stack if isinstance(mode, Intercept)]
