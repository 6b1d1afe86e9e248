"""What can go wrong through no fault of the library.

Every message says what was expected, what came, the likely cause and what to do.
All errors are ValueErrors with one ancestor, so that a caller can catch them together
and the command line can print them without a traceback.
"""

__all__ = [
    "AnybatchError",
    "BatchError",
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "LayoutError",
    "LedgerError",
    "LossError",
    "ModelError",
    "OrderError",
    "RecipeError",
    "RunError",
    "Terminated",
]


class AnybatchError(ValueError):
    """Ancestor of every error that a user can mend."""


class BatchError(AnybatchError):
    """A batch that cannot be cut into examples."""


class LossError(AnybatchError):
    """Example losses, counts or groups that no reduction can use."""


class DivergenceError(LossError):
    """A loss that left the numbers, or grows without end."""


class ModelError(AnybatchError):
    """A model whose update would depend on the layout."""


class LayoutError(AnybatchError):
    """A cut of the batch that the objective does not allow."""


class LedgerError(AnybatchError):
    """A model whose examples cannot be told apart where they meet a parameter."""


class OrderError(AnybatchError):
    """An order of examples that cannot be kept."""


class DataError(AnybatchError):
    """Data that are missing, damaged or of the wrong kind."""


class RecipeError(AnybatchError):
    """A recipe with an unknown key or a wrong value."""


class CheckpointError(AnybatchError):
    """A checkpoint that is damaged, foreign or cannot be written."""


class RunError(AnybatchError):
    """A run folder that cannot be used as asked."""


class Terminated(KeyboardInterrupt):
    """A command is asked to end by SIGTERM, as it is by Ctrl-C. No error of the user's."""
