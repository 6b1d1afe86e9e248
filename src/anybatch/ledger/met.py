"""What a rule tells of an operation in which the batch meets parameters."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from anybatch.ledger.contractions.base import Contraction

__all__ = ["Const", "Met", "Rule"]

Make = Callable[..., Contraction]
Const = Callable[[Tensor], Tensor]
"""A parameter as a constant; anything else as it is, with its graph."""


class Met(NamedTuple):
    """An operation, computed with its parameters as constants."""

    output: Tensor
    leading: int  # how many dimensions of the output may be those of examples
    saved: tuple[Tensor, ...]  # what the gradients need, laid out as the output
    uses: list[tuple[Tensor, Make]]
    """Each parameter, and what makes its contraction of (d, *saved), examples first."""


Rule = Callable[..., Met | None]
"""`(const, *args, **kwargs)` of the operation; None: not in this form."""
