"""Trainable tensors that losses depend on, and that are no parameters of the model."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from anybatch.errors import ModelError
from anybatch.gradient.closures import tensors_used_by
from anybatch.gradient.update import Update

__all__ = ["check_leaves"]


def check_leaves(update: Update, values: Iterable[Tensor]) -> None:
    """Refuse losses with a trainable tensor that would get no gradient.

    Parameters of modules outside of the model, such as a critic, are left alone: somebody else
    trains them. So are tensors that the losses make themselves, to differentiate by.

    Raises:
        ModelError: a parameter that no module known to the update holds.
    """
    outside = [module() for module in update.facts.outside.values()]
    modules = [update.model, *(module for module in outside if module is not None)]
    known = {id(p) for module in modules for p in module.parameters()}
    names = {id(t): name for name, t in tensors_used_by(update.objective.example_losses).items()}
    for leaf in _leaves(values):
        if id(leaf) not in known and (id(leaf) in names or isinstance(leaf, nn.Parameter)):
            what = f"tensor {names[id(leaf)]!r}" if id(leaf) in names else "parameter"
            raise ModelError(
                f"The losses depend on a trainable {what} of shape {tuple(leaf.shape)} that is no "
                f"parameter of the model, and would get no gradient. Make it one, such as by "
                f"model.register_parameter, or use its detach() in the loss."
            )


def _leaves(values: Iterable[Tensor]) -> Iterator[Tensor]:
    """Walk through a graph to the tensors that gradients are accumulated in."""
    waiting: list[Any] = [get_gradient_edge(v).node for v in values if v.requires_grad]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for follower, _ in node.next_functions:
            if follower is not None and follower not in seen:
                seen.add(follower)
                waiting.append(follower)
