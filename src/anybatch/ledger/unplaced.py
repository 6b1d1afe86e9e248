"""Errors and contexts for code that the ledger cannot take apart by example.

Plain autograd can differentiate such code, so `plain_autograd` takes the examples one at a time.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from anybatch.errors import AnybatchError, LedgerError

__all__ = ["UnplacedError", "convert_errors", "disable_compile"]


class UnplacedError(LedgerError):
    """The ledger cannot find the examples in an operation.

    Args:
        message: what is wrong, and what to do.
        is_replaced: whether the plan has chosen another placement, so that a repeated step can
            succeed.
    """

    def __init__(self, message: str, is_replaced: bool = False) -> None:
        super().__init__(message)
        self.is_replaced = is_replaced

    def __reduce__(self) -> tuple[type["UnplacedError"], tuple[str, bool]]:
        return UnplacedError, (str(self), self.is_replaced)  # so that it can travel to other ranks


@contextmanager
def convert_errors() -> Iterator[None]:
    """Convert an error of torch in a watched operation into an `UnplacedError`.

    An error of the user's own code is raised again when the examples go one at a time.
    """
    try:
        yield
    except (AnybatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnplacedError(
            f"The ledger cannot take an operation apart by example. Torch says: "
            f"{type(error).__name__}: {error}"
        ) from error


def disable_compile() -> AbstractContextManager[object]:
    """Return a context in which compiled code runs as Python.

    The ledger sees the operations then, and can go through their graph more than once.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
