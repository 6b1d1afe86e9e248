"""Error for code that the ledger cannot take apart by example."""

from anybatch.errors import LedgerError

__all__ = ["UnplacedError"]


class UnplacedError(LedgerError):
    """Error for an operation in which the ledger cannot find the examples.

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
