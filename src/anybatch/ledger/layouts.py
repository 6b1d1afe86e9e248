"""Copies of parameters for each example, made by repeating, stacking or concatenating them.

    y = f(p),    y_k = p_(j_k)  for elements k,     j = f(0, 1, 2, ...)

Such an operation moves elements and changes none, so that the same operation on their numbers tells
where each comes from. Examples lie where a placement finds the same numbers for each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch._torch import tree_map
from anybatch.ledger.placement import Placement, placements

__all__ = ["places_of_copies", "sources"]


def sources(
    func: Callable[..., Any], args: Any, kwargs: Any, parameters: Sequence[Tensor]
) -> Tensor:
    """The element that each element of the result is, counted through all parameters."""
    numbers, start = {}, 0
    for p in parameters:
        own = torch.arange(start, start + p.numel(), device=p.device).view(p.shape)
        numbers[id(p)], start = own, start + p.numel()
    args, kwargs = tree_map(lambda leaf: numbers.get(id(leaf), leaf), (args, kwargs))
    found: Tensor = func(*args, **kwargs)
    return found


def places_of_copies(elements: Tensor, num_examples: int) -> list[Placement]:
    """The placements at which every example has the same elements."""
    found = []
    for place in placements(tuple(elements.shape), num_examples, elements.ndim):
        own = place.first(elements, num_examples)
        if bool((own == own[:1]).all()):
            found.append(place)
    return found
