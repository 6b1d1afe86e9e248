"""Operations whose examples the ledger cannot find, and code that it cannot see into.

Plain autograd needs neither: `one_by_one` is what is left then.
"""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from anybatch.errors import AnybatchError, LedgerError

__all__ = ["AsUnplaced", "UnplacedError", "uncompiled"]


class UnplacedError(LedgerError):
    """An operation whose examples the ledger cannot find; plain autograd needs no such thing."""

    def __init__(self, message: str, is_replaced: bool = False) -> None:
        super().__init__(message)
        self.is_replaced = is_replaced
        """Whether the plan has taken another place for them, so that the step may be repeated."""

    def __reduce__(self) -> tuple[type["UnplacedError"], tuple[str, bool]]:
        return UnplacedError, (str(self), self.is_replaced)  # as it travels to other ranks


class AsUnplaced:
    """Turn an error of torch in an operation that is watched into one of the ledger.

    An error of the user's own code comes again when examples go one by one, and passes then.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        own = (AnybatchError, torch.OutOfMemoryError)
        if isinstance(error, Exception) and not isinstance(error, own):
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
