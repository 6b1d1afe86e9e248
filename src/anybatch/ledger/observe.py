"""The ledger in a loop of one's own.

    with ab.observe(model) as ledger:
        loss = criterion(model(inputs), targets)
        loss.backward()
    ledger.norms     |g_i|, what example i adds to .grad; sum_i g_i is what backward has left there

Examples lie along the first dimension of the first tensor that a call is given, unless `examples`
and `dim` say otherwise. A module that is called with inputs of its own begins a micro-batch: its
rows are further examples. One that takes in what other modules have made, such as the head of a
model, goes on with their examples. The ledger holds the examples of all backward passes, in the
order of their forward passes, since `.grad` was last cleared or a weight changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from anybatch.batch import is_count
from anybatch.errors import LedgerError
from anybatch.ledger.active_modes import active_modes
from anybatch.ledger.observe_backward import BackwardPasses
from anybatch.ledger.observe_forward import Loop
from anybatch.ledger.observe_micro_batches import trainable
from anybatch.ledger.unplaced import uncompiled

__all__ = ["Observed", "observe"]


@final
class Observed:
    """What each example has added to `.grad` since it was cleared or a weight changed."""

    def __init__(self, passes: BackwardPasses) -> None:
        self._passes = passes

    @property
    def parameter_norms(self) -> dict[str, Tensor]:
        """|g_i| [B] of each parameter that was reached, by name.

        Raises:
            LedgerError: nothing was observed yet.
        """
        entries = self._passes.entries
        if not entries:
            raise LedgerError(
                "nothing was observed yet. The ledger expects model(...) and loss.backward() "
                "within 'with ab.observe(model) as ledger:'. Was the forward pass before it?"
            )
        some = next(iter(entries[0].squares.values()))
        squares = {
            name: [m.squares.get(name, some.new_zeros(m.size)) for m in entries]
            for name in dict.fromkeys(name for m in entries for name in m.squares)
        }
        return {name: torch.cat(parts).sqrt() for name, parts in squares.items()}

    @property
    def norms(self) -> Tensor:
        """|g_i| [B], what each example adds to `.grad`."""
        return torch.stack(list(self.parameter_norms.values())).square().sum(0).sqrt()


@contextmanager
def observe(
    model: nn.Module, examples: int | None = None, dim: int | None = None
) -> Iterator[Observed]:
    """See what each example adds to `.grad`, in code that is not changed for it.

    Within the context the model or its parts are called and `backward` too, in any order. Under a
    GradScaler norms are those of the loss before it was scaled.

    Args:
        model: the model, whose parameters are watched.
        examples: B, the number of examples of each forward pass; None: it is read off the first
            tensor that a call is given.
        dim: the dimension of inputs along which examples lie; None: the first.

    Raises:
        LedgerError: examples that cannot be told apart, or nothing that was observed.

    Example:
        >>> model, x = torch.nn.Linear(4, 1), torch.ones(8, 4)
        >>> with observe(model) as ledger:
        ...     model(x).square().mean().backward()
        >>> ledger.norms.shape
        torch.Size([8])
    """
    if examples is not None and not is_count(examples):
        raise LedgerError(
            f"ab.observe was given examples={examples!r}. It expects a number of examples, at "
            f"least 1, or None."
        )
    if dim is not None and not isinstance(dim, int):
        raise LedgerError(
            f"ab.observe was given dim={dim!r}. It expects the number of a dimension, or None."
        )
    parameters = trainable(model)
    if not parameters:
        raise LedgerError(
            "ab.observe was given a model without a parameter that requires a gradient. There is "
            "nothing to observe. Unfreeze a parameter, or leave the model unobserved."
        )
    _refuse_twice(parameters)
    loop = Loop(model, examples, dim)
    passes = BackwardPasses(loop)
    with uncompiled(), loop.calls.entered(), loop.mode:
        try:
            yield Observed(passes)
            passes.finish()
        finally:
            loop.forget()


def _refuse_twice(parameters: dict[str, nn.Parameter]) -> None:
    """See that no other context watches the same parameters."""
    for mode in active_modes():
        for name, p in parameters.items():
            if id(p) in mode.names:
                raise LedgerError(
                    f"{name} is observed by two ab.observe contexts at once. Its gradients can go "
                    f"to one ledger only. Observe the whole model in one context; norms of its "
                    f"parts are in ledger.parameter_norms."
                )
