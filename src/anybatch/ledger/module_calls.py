"""Calls of a model or of its parts in a loop of one's own: those that no other call contains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from anybatch.ledger.call_plans import unwrap
from anybatch.pytree import Shared

__all__ = ["ModuleCalls"]

Before = Callable[[nn.Module, Any, Any], None]
After = Callable[[nn.Module, Any], None]


class ModuleCalls:
    """Hooks on a model and its parts while the context is entered.

    Args:
        model: whose calls to see.
        before: called with the module, its args and kwargs.
        after: called with the module and its output; None if it has raised an error.
    """

    def __init__(self, model: nn.Module, before: Before, after: After) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        """Of the modules, "" for the model."""
        self.is_ignored = False
        """While the library calls the modules."""
        self._stack: list[nn.Module] = []
        self._before, self._after = before, after

    @property
    def is_inside(self) -> bool:
        """Whether a module is being called."""
        return bool(self._stack)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """See the calls."""
        handles = []
        for module in self.names:
            if hasattr(module, "_c"):  # scripted: its calls stay unseen
                continue
            handles += [
                module.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.is_ignored or module not in self.names:  # a copy of the model has the hooks too
            return None
        self._stack.append(module)
        if len(self._stack) > 1:
            return None
        self._before(module, args, kwargs)
        has_shared = any(isinstance(leaf, Shared) for leaf in tree_leaves((args, kwargs)))
        return tree_map(unwrap, (args, kwargs)) if has_shared else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_ignored or not self._stack or self._stack[-1] is not module:
            return
        self._stack.pop()
        if not self._stack:
            self._after(module, output)
