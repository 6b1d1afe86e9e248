"""Errors for batches that cannot be counted or cut: they name the leaf and say what to do."""

from collections.abc import Iterator, Sequence
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

from anybatch.errors import BatchError

__all__ = ["describe_leaf", "refuse_count", "refuse_cut"]


def refuse_count(leaves: Sequence[tuple[str, Any]], place: str, batch: Any) -> BatchError:
    """Make the error for a batch whose examples cannot be counted.

    Args:
        leaves: those that should hold examples, with the expressions that reach them.
        place: the expression for the batch.
    """
    if not leaves:
        return BatchError(
            f"The {place}, of type {_name_type(batch)}, holds no tensor and no array. Pass tensors "
            f"that have the examples as their first dimension, alone or in a dict, tuple or "
            f"dataclass."
        )
    first: dict[int, str] = {}
    for path, leaf in leaves:
        if not (isinstance(leaf, Tensor | np.ndarray) and leaf.ndim):
            return BatchError(f"{path} is {describe_leaf(leaf)}. {_advise(path, leaf)}")
        first.setdefault(leaf.shape[0], path)
    counts = ", ".join(f"{path} has {n}" for n, path in [*first.items()][:4])
    advice = "Stack or pad tensors that are one example each."
    if place == "batch":
        advice += " Wrap a tensor that belongs to the whole batch in ab.Shared(...)."
    return BatchError(
        f"The leaves of the {place} hold different numbers of examples: {counts}. Each must have "
        f"the examples as its first dimension. {advice}"
    )


def describe_leaf(leaf: Any) -> str:
    """Describe a leaf that holds no examples, as the end of a sentence."""
    if isinstance(leaf, Tensor | np.ndarray):
        return f"a {'tensor' if isinstance(leaf, Tensor) else 'NumPy array'} of shape ()"
    if isinstance(leaf, Number):
        return f"the number {leaf} ({_name_type(leaf)})"
    return f"of type {_name_type(leaf)}"


def _advise(place: str, leaf: Any) -> str:
    """Say what to do about a leaf without examples."""
    is_in_list = place.endswith("]") and not place.endswith("']")
    if isinstance(leaf, str | bytes) and is_in_list:
        return (
            "A list of strings cannot be cut into micro-batches. Turn the strings into tensors, by "
            "a tokenizer in collate=... for instance, or put them into one array, np.array(texts)."
        )
    if isinstance(leaf, Number | str | bytes | Tensor | np.ndarray):
        advice = (
            "Every leaf must have the examples as its first dimension. Make the values of the "
            "examples one tensor of shape [B]."
        )
        shared = " Wrap a value that belongs to the whole batch in ab.Shared(...)."
        return advice + shared if place.startswith("batch") else advice
    if hasattr(leaf, "dataset") and hasattr(leaf, "batch_sampler"):
        return "It is a loader. Pass one of its batches: for batch in loader: ... batch ..."
    if isinstance(leaf, set | frozenset | Iterator | range):
        return "It cannot be indexed by example. Make it a tensor, torch.tensor(list(...))."
    return (
        "The library cannot find the tensors in it. Pass them in a dict, a tuple or a dataclass. "
        "To batch such objects, give ab.steps a list of examples and collate=..., which is called "
        "for each micro-batch."
    )


def refuse_cut(place: str, leaf: Tensor) -> BatchError:
    """Make the error for a tensor that cannot be cut into micro-batches."""
    if leaf.grad_fn is not None:
        return BatchError(
            f"{place} has a graph behind it ({leaf.grad_fn.name()}), which the backward passes of "
            f"several micro-batches would go through more than once. Compute it in example_losses, "
            f"detach() it, or pass the batch whole, with micro_batch=None."
        )
    kind = "a nested tensor" if leaf.is_nested else f"a sparse tensor ({leaf.layout})"
    return BatchError(
        f"{place} is {kind}, which cannot be cut into micro-batches. Make it dense by "
        f"{'to_padded_tensor(0)' if leaf.is_nested else 'to_dense()'}, or pass the batch whole, "
        f"with micro_batch=None."
    )


def _name_type(thing: Any) -> str:
    kind = type(thing)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
