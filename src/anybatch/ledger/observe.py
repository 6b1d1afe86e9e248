"""Ledger of the user's own loop.

    with ab.observe(model) as ledger:
        loss = criterion(model(inputs), targets)
        loss.backward()
    ledger.norms     |g_i|, g_i the gradient that example i adds to .grad

Examples lie along the first dimension of the first tensor of a call, unless `examples` and `dim`
say otherwise. A module that is called with new inputs begins a micro-batch: its rows are further
examples. A module that takes outputs of others, such as the head of a model, continues with their
examples. The ledger holds the examples of all backward passes, in the order of their forward
passes, since `.grad` was last cleared or a weight changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from anybatch.batch import is_count
from anybatch.errors import LedgerError
from anybatch.ledger.intercept import list_active_modes
from anybatch.ledger.observe_backward import BackwardObserver
from anybatch.ledger.observe_forward import ForwardObserver
from anybatch.ledger.observe_micro_batches import trainable
from anybatch.ledger.trial_run import disable_compile

__all__ = ["Observed", "observe"]


@final
class Observed:
    """Gradients that each example has added to `.grad` since it was cleared or a weight changed.

    Example:
        >>> model, x = torch.nn.Linear(4, 1), torch.ones(8, 4)
        >>> with observe(model) as ledger:
        ...     model(x).square().mean().backward()
        >>> {name: norms.shape for name, norms in ledger.parameter_norms.items()}
        {'weight': torch.Size([8]), 'bias': torch.Size([8])}
    """

    def __init__(self, backward: BackwardObserver) -> None:
        self._results = backward.results

    @property
    def parameter_norms(self) -> dict[str, Tensor]:
        """|g_i| [B] for each parameter that a backward pass has reached, by name.

        Raises:
            LedgerError: nothing was observed yet.
        """
        micro_batches = self._results.micro_batches
        if not micro_batches:
            raise LedgerError(
                "Nothing was observed yet. The ledger expects model(...) and loss.backward() "
                "within 'with ab.observe(model) as ledger:'. Was the forward pass before it?"
            )
        some = next(iter(micro_batches[0].squares.values()))
        squares = {
            name: [m.squares.get(name, some.new_zeros(m.size)) for m in micro_batches]
            for name in dict.fromkeys(name for m in micro_batches for name in m.squares)
        }
        return {name: torch.cat(parts).sqrt() for name, parts in squares.items()}

    @property
    def norms(self) -> Tensor:
        """|g_i| [B], of the gradient that each example adds to `.grad`."""
        return torch.stack(list(self.parameter_norms.values())).square().sum(0).sqrt()


@contextmanager
def observe(
    model: nn.Module, examples: int | None = None, dim: int | None = None
) -> Iterator[Observed]:
    """Observe the gradient that each example adds to `.grad`, in unchanged code.

    Within the context, call the model or its modules and `backward`, in any order. With a
    GradScaler, norms belong to the loss before it was scaled.

    Args:
        model: the model whose parameters are observed.
        examples: B, the number of examples of each forward pass; None: the size of the first tensor
            of a call.
        dim: the dimension of inputs along which examples lie; None: the first.

    Raises:
        LedgerError: examples cannot be told apart, or nothing was observed.

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
    forward = ForwardObserver(model, examples, dim)
    backward = BackwardObserver(forward)
    with disable_compile(), forward.hooks.register(), forward.mode:
        try:
            yield Observed(backward)
            backward.finish()
        finally:
            forward.micro_batches.close_all()


def _refuse_twice(parameters: dict[str, nn.Parameter]) -> None:
    """Check that no other context observes the same parameters."""
    for mode in list_active_modes():
        for name, p in parameters.items():
            if id(p) in mode.tracker.names:
                raise LedgerError(
                    f"{name} is observed by two ab.observe contexts at once. Its gradients can go "
                    f"to one ledger only. Observe the whole model in one context; norms of its "
                    f"parts are in ledger.parameter_norms."
                )
