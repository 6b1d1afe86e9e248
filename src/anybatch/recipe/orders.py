"""Build the order of a recipe, over the train split."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from anybatch.data import DataSet, OrderWithin
from anybatch.errors import RecipeError
from anybatch.examples import count_examples
from anybatch.order import Order, OrderProtocol
from anybatch.order.by_length import ByLength
from anybatch.order.growing import Growing
from anybatch.order.weighted import Weighted
from anybatch.recipe.names import call_function, find_function
from anybatch.recipe.schema import BatchSection, Recipe

__all__ = ["ORDERS", "build_order"]


def build_order(recipe: Recipe, data: DataSet, ids: Tensor, *, allow_code: bool) -> OrderWithin:
    """Build the order over the examples with these ids.

    Raises:
        RecipeError: a wrong name or argument; OrderError: an order that these data or this batch
            size do not allow.
    """
    section = recipe.order
    make = find_function(section.name, ORDERS, "order", allow_code=allow_code)
    objects = {"data": data.select(ids), "batch": recipe.batch, "seed": recipe.run.seed}
    order = call_function(make, section.args, "order.args", **objects)
    if not isinstance(order, OrderProtocol):
        raise RecipeError(
            f"order {section.name!r} made a {type(order).__name__}. Expected an object with seed, "
            f"indices, num_steps, epoch and examples_before, as ab.Order has."
        )
    return OrderWithin(order, ids)


def _build_shuffled(data: DataSet, batch: BatchSection, seed: int) -> Order:
    return Order(count_examples(data.columns), batch_size=batch.size, seed=seed, last=batch.last)


def _build_by_length(data: DataSet, batch: BatchSection, seed: int, window: int = 50) -> ByLength:
    kind = "ragged sequences, such as those of 'verses'"
    lengths = _get_column(data, "lengths", "by_length", kind)
    _check_last(batch, "by_length", "carry")
    return ByLength(lengths, batch_size=batch.size, seed=seed, last=batch.last, window=window)  # type: ignore[arg-type]


def _build_weighted(data: DataSet, batch: BatchSection, seed: int) -> Weighted:
    kind = "sample weights: data.args.weights = '...'"
    weights = _get_column(data, "weights", "weighted", kind)
    _check_last(batch, "weighted", "drop")
    return Weighted(weights, batch_size=batch.size, seed=seed)


def _build_growing(
    data: DataSet, batch: BatchSection, seed: int, sizes: Sequence[Sequence[int]]
) -> Growing:
    _check_last(batch, "growing", "drop")
    pairs: Any = [(0, batch.size), *map(tuple, sizes)]
    return Growing(count_examples(data.columns), sizes=pairs, seed=seed)


ORDERS: dict[str, Callable[..., OrderProtocol]] = {
    "shuffled": _build_shuffled,
    "by_length": _build_by_length,
    "weighted": _build_weighted,
    "growing": _build_growing,
}


def _get_column(data: DataSet, name: str, order: str, kind: str) -> Tensor:
    column: Tensor | None = getattr(data, name, None)
    if column is None:
        raise RecipeError(f"order.name = {order!r} needs data with {kind}; these have none.")
    return column


def _check_last(batch: BatchSection, order: str, value: str) -> None:
    """Refuse the value of batch.last that an order cannot have."""
    if batch.last == value:
        why = "its windows end with the epoch" if value == "carry" else "its batches run on"
        raise RecipeError(
            f"batch.last = {value!r} does not go with order.name = {order!r}: {why}. Take "
            f"batch.last out."
        )
