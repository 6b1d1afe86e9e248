"""Errors that a user can cause, and can fix.

Every message says what is wrong, what is expected and what to do. All errors are ValueErrors with
one ancestor, so a caller can catch them together, and the command line prints them without a
traceback.
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
    "VersionError",
]


class AnybatchError(ValueError):
    """Ancestor of every error that a user can fix."""


class BatchError(AnybatchError):
    """A batch that cannot be cut into examples."""


class LossError(AnybatchError):
    """Example losses, counts or groups that no reduction can use."""


class DivergenceError(LossError):
    """A loss that is not finite, or grows without end."""


class ModelError(AnybatchError):
    """A model whose update would depend on the layout."""


class LayoutError(AnybatchError):
    """A cut of the batch that the objective does not allow."""


class LedgerError(AnybatchError):
    """A model whose examples cannot be separated where they meet a parameter."""


class OrderError(AnybatchError):
    """An order of examples that cannot be followed."""


class DataError(AnybatchError):
    """Data that are missing, damaged or of the wrong kind."""


class RecipeError(AnybatchError):
    """A recipe with an unknown key or a wrong value."""


class CheckpointError(AnybatchError):
    """A checkpoint that is damaged, belongs to another run, or cannot be written."""


class RunError(AnybatchError):
    """A run folder that cannot be used as requested."""


class VersionError(AnybatchError):
    """Report a version of torch that anybatch does not work with."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended a command, as Ctrl-C does. It is no error of the user's."""
