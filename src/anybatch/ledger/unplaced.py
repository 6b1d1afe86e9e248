"""Operations whose examples the ledger cannot find, and code that it cannot see into.

Plain autograd needs neither: `one_by_one` is what is left then.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from anybatch.errors import AnybatchError, LedgerError

__all__ = ["UnplacedError", "naming_failures", "uncompiled"]


class UnplacedError(LedgerError):
    """An operation whose examples the ledger cannot find; plain autograd needs no such thing."""

    def __init__(self, message: str, is_replaced: bool = False) -> None:
        super().__init__(message)
        self.is_replaced = is_replaced
        """Whether the plan has taken another place for them, so that the step may be repeated."""

    def __reduce__(self) -> tuple[type["UnplacedError"], tuple[str, bool]]:
        return UnplacedError, (str(self), self.is_replaced)  # as it travels to other ranks


@contextmanager
def naming_failures() -> Iterator[None]:
    """Turn an error of torch in an operation that is watched into one of the ledger.

    An error of the user's own code comes again when examples go one by one, and passes then.
    """
    try:
        yield
    except (AnybatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnplacedError(
            f"an operation cannot be taken apart by example: {type(error).__name__}: {error}"
        ) from error


def uncompiled() -> AbstractContextManager[object]:
    """Let compiled code run as the Python it was compiled from.

    Its operations can then be seen, and its graph gone through more than once.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
