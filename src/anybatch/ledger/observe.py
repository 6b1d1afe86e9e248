"""The ledger in a loop of one's own.

    with ab.observe(model) as ledger:
        loss = criterion(model(inputs), targets)
        loss.backward()
    ledger.norms     |g_i|, what example i adds to .grad; sum_i g_i is what backward has left there

Examples lie along the first dimension of what the model is given.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from anybatch.errors import LedgerError
from anybatch.ledger.collect import Collected
from anybatch.ledger.intercept import Intercept, Plan
from anybatch.ledger.observer import Pass
from anybatch.ledger.plans import NUM_PROBED, plan_of
from anybatch.randomness import generators_restored, seed_generators

__all__ = ["Observed", "observe"]


@final
class Observed:
    """What the last backward pass has shown."""

    def __init__(self) -> None:
        self._found: Collected | None = None

    @property
    def parameter_norms(self) -> dict[str, Tensor]:
        """|g_i| [B] of each parameter that was reached, by name.

        Raises:
            LedgerError: nothing was observed yet.
        """
        if self._found is None:
            raise LedgerError(
                "nothing was observed yet, expected model(...) and loss.backward() within "
                "'with ab.observe(model) as ledger:'. Was the forward pass before it?"
            )
        return {name: squares.sqrt() for name, squares in self._found.squares.items()}

    @property
    def norms(self) -> Tensor:
        """|g_i| [B], what each example adds to `.grad`."""
        return torch.stack(list(self.parameter_norms.values())).square().sum(0).sqrt()


@contextmanager
def observe(model: nn.Module) -> Iterator[Observed]:
    """See what each example adds to `.grad`, in code that is not changed for it.

    Within the context the model is called and `backward` too, as often as one likes, in turn.

    Raises:
        LedgerError: examples that cannot be told apart.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ledger, watched = Observed(), Pass(parameters, 1, Plan())
    is_forward = False  # between a forward pass and the way back
    handle: Any = None

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal is_forward
        if is_forward or module is not model:
            return  # called again, for the same loss; or a copy, which has got the hook too
        is_forward = True
        with _paused(watched.mode):
            handle.remove()
            size, plan = _plan(model, parameters, args, kwargs)
            listen()
        watched.renew(size, plan)

    def backward(run: Callable[[], object]) -> None:
        nonlocal is_forward
        ledger._found = watched.collected(run)
        is_forward = False

    def listen() -> None:
        nonlocal handle
        handle = model.register_forward_pre_hook(before, with_kwargs=True)

    listen()
    watched.mode.on_backward = backward
    try:
        with watched.mode:
            yield ledger
    finally:
        handle.remove()


@contextmanager
def _paused(mode: Intercept) -> Iterator[None]:
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()  # type: ignore[no-untyped-call]


def _plan(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], args: Any, kwargs: Any
) -> tuple[int, Plan]:
    """How many examples the model is given, and where they lie."""
    leaves = [
        leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim
    ]
    if not leaves:
        raise LedgerError(
            "the model was called without a tensor, expected inputs with the examples first."
        )
    size = len(leaves[0])
    few = min(NUM_PROBED, size)

    def values(context: AbstractContextManager[object]) -> Tensor:
        """Some number of each example's own output."""

        def cut(leaf: Any) -> Any:
            is_batch = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size
            return leaf.detach()[:few] if is_batch else leaf

        own_args, own_kwargs = tree_map(cut, (args, kwargs))
        with generators_restored(leaves[0].device), torch.enable_grad():
            seed_generators(0, leaves[0].device)
            with context:
                outputs = tree_leaves(model(*own_args, **own_kwargs))
        floats = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
        numbers = [x.reshape(few, -1) for x in floats if x.ndim and len(x) == few]
        if not numbers:
            raise LedgerError("the model gave no tensor with the examples first, expected one.")
        return torch.stack([_mixed(x) for x in numbers]).sum(0)

    mode = tuple(module.training for module in model.modules())
    return size, plan_of(model, mode, parameters, values, None)


def _mixed(outputs: Tensor) -> Tensor:
    """[B, k] to [B], by weights that let no sum cancel, as that of a softmax would."""
    k = outputs.shape[1]
    return outputs @ torch.cos(torch.arange(k, device=outputs.device)).to(outputs.dtype)
