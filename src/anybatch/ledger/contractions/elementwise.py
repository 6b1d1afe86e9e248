"""Operations that repeat a parameter over the batch: `x + p`, `x * p`, `x[i] = p`, `p.expand(..)`.

    P_i = p for each example i,    y = f(x, P) for y = f(x, p),    g_i = dL/dP_i

The copies P_i are a view of p that broadcasts against x, so that autograd sums over the dimensions
along which p is repeated within one example. If examples own single rows, each row gets a copy:

    g_i = sum of u_r over the rows r of example i,    u_r = dL/dP_r

`repeat`, `stack` and `cat` move elements and change none. The same operation on element numbers
shows which element of p each element of the result is.
"""

from typing import Any

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Broadcast, Contraction
from anybatch.ledger.contractions.calls import Call, Context, broadcast_size
from anybatch.ledger.contractions.placement import Placement, Site, list_placements
from anybatch.ledger.gradient_taps import copy_constant

__all__ = ["run_assignment", "run_elementwise", "run_expansion", "run_rearrangement"]


def run_elementwise(call: Call, context: Context) -> Any:
    """Run an elementwise operation with copies of its parameters."""
    shapes = [t.shape for t in (*call.data, *call.parameters)]
    shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    placement = None
    if not call.is_in_place:
        placement = context.place_broadcast(call, shape, by_rows=True)
    if placement is None:
        return context.run_shared(call)
    return call.run_with(lambda p: _lay_out_copies(context, p, call.sites[id(p)], placement, shape))


def run_assignment(call: Call, context: Context) -> Any:
    """Run `x[index] = p` with copies of p."""
    x, index, p = call.args
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
    shape = tuple(x.shape if is_mask else x[index].shape)
    placement = context.place_broadcast(call, shape)
    if placement is None:
        if context.num_examples == 1:
            return context.run_single(call)
        call.run()
        return context.run_derived(call, x)
    copies = _lay_out_copies(context, p, call.site, placement, shape)
    return call.func(x, index, copies.expand(shape)[index] if is_mask else copies)


def run_expansion(call: Call, context: Context) -> Any:
    """Run `p.expand(..)` or `p.repeat(..)`: a parameter repeated per example is its copies."""
    (p,), result = call.parameters, call.run()
    shape = tuple(result.shape)
    sizes = [broadcast_size(p, k, len(shape)) for k in range(len(shape))]
    repeated = {size for size, n in zip(sizes, shape, strict=True) if size != n}
    if not repeated <= {1} or len(shape) < p.ndim:
        return run_rearrangement(call, context)
    placement = context.place_broadcast(call, shape)
    if placement is None:
        return context.run_derived(call, result)
    return _lay_out_copies(context, p, call.site, placement, shape).expand(shape)


def run_rearrangement(call: Call, context: Context) -> Any:
    """Run an operation that lays out elements of parameters for each example."""
    if context.plan.placements.get(call.site, ...) is None:
        return context.run_derived(call, call.run())
    size = context.num_examples
    parameters = list({id(p): p for p in call.parameters}.values())
    elements = _trace_elements(call, parameters)
    possible = _list_copy_placements(elements, size)
    placement = context.plan.choose_placement(call.site, possible, size)
    if placement is None:
        return context.run_derived(call, call.run())
    copies = [
        context.copy_parameter(p, call.sites[id(p)], placement).flatten(1) for p in parameters
    ]
    indices = placement.move_first(elements, size)[0]
    return placement.move_back(torch.cat(copies, 1)[:, indices])


def _trace_elements(call: Call, parameters: list[Tensor]) -> Tensor:
    """Compute which element each element of the result is, counted through all parameters."""
    numbers, start = {}, 0
    for p in parameters:
        numbers[id(p)] = torch.arange(start, start + p.numel(), device=p.device).view(p.shape)
        start += p.numel()
    elements: Tensor = call.run_with(lambda p: numbers[id(p)])
    return elements


def _list_copy_placements(elements: Tensor, num_examples: int) -> list[Placement]:
    """List the placements at which every example has the same elements."""
    possible = []
    for place in list_placements(tuple(elements.shape), num_examples, elements.ndim):
        rows = place.move_first(elements, num_examples)
        if bool((rows == rows[:1]).all()):
            possible.append(place)
    return possible


def _lay_out_copies(
    context: Context, p: Tensor, site: Site, placement: Placement, shape: tuple[int, ...]
) -> Tensor:
    """Make copies of a parameter that broadcast to a shape with the examples at a placement."""
    if placement.kind == "rows":
        return _copy_for_rows(context, p, site, placement, shape)
    aligned = [broadcast_size(p, k, len(shape)) for k in range(len(shape))]
    k, size = placement.dim, context.num_examples
    copies = context.copy_parameter(p, site, placement).reshape(size, *aligned)
    if placement.kind == "dim":
        return placement.move_back(copies.squeeze(k + 1))
    sizes = [-1] * len(shape)
    sizes[k] = shape[k] // size
    return placement.move_back(copies.expand(size, *sizes))


def _copy_for_rows(
    context: Context, p: Tensor, site: Site, placement: Placement, shape: tuple[int, ...]
) -> Tensor:
    """Make one copy of a parameter for each row of a shape, whichever example owns it."""
    context.tracker.count_use(site)

    def receive(d: Tensor) -> None:
        def make(place: Placement) -> list[Contraction]:
            return [Broadcast(place.move_first(d, context.num_examples), tuple(p.shape))]

        context.receive([site], placement, make, d)

    return copy_constant(context.tracker.detach(p), shape, receive)
