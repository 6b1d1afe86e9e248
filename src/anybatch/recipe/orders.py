"""The order that a recipe's [order] states, over the part of the data to train on."""

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
from anybatch.recipe.names import called, looked_up
from anybatch.recipe.schema import BatchSection, Recipe

__all__ = ["ORDERS", "order_of"]


def order_of(recipe: Recipe, data: DataSet, ids: Tensor, *, allow_code: bool) -> OrderWithin:
    """In which order the examples of those ids are visited.

    Raises:
        RecipeError: a name or argument that is not expected; OrderError: an order that these data
            or this batch size do not allow.
    """
    section = recipe.order
    make = looked_up(section.name, ORDERS, "order", allow_code=allow_code)
    given = {"data": data.of_ids(ids), "batch": recipe.batch, "seed": recipe.run.seed}
    order = called(make, section.args, "order.args", **given)
    if not isinstance(order, OrderProtocol):
        raise RecipeError(
            f"order {section.name!r} made a {type(order).__name__}, expected an object with seed, "
            f"indices, num_steps, epoch and examples_before, as ab.Order has."
        )
    return OrderWithin(order, ids)


def _shuffled(data: DataSet, batch: BatchSection, seed: int) -> Order:
    return Order(count_examples(data.columns), batch_size=batch.size, seed=seed, last=batch.last)


def _by_length(data: DataSet, batch: BatchSection, seed: int, window: int = 50) -> ByLength:
    lengths = _column(data, "by_length", "lengths", "ragged sequences, such as those of 'verses'")
    _check_last(batch, "by_length", "carry")
    return ByLength(lengths, batch_size=batch.size, seed=seed, last=batch.last, window=window)  # type: ignore[arg-type]


def _weighted(data: DataSet, batch: BatchSection, seed: int) -> Weighted:
    weights = _column(data, "weighted", "weights", "sample weights: data.args.weights = '...'")
    _check_last(batch, "weighted", "drop")
    return Weighted(weights, batch_size=batch.size, seed=seed)


def _growing(
    data: DataSet, batch: BatchSection, seed: int, sizes: Sequence[Sequence[int]]
) -> Growing:
    _check_last(batch, "growing", "drop")
    pairs: Any = [(0, batch.size), *map(tuple, sizes)]
    return Growing(count_examples(data.columns), sizes=pairs, seed=seed)


ORDERS: dict[str, Callable[..., OrderProtocol]] = {
    "shuffled": _shuffled,
    "by_length": _by_length,
    "weighted": _weighted,
    "growing": _growing,
}


def _column(data: DataSet, order: str, name: str, kind: str) -> Tensor:
    column: Tensor | None = getattr(data, name, None)
    if column is None:
        raise RecipeError(f"order.name = {order!r} expects data with {kind}; these have none.")
    return column


def _check_last(batch: BatchSection, order: str, refused: str) -> None:
    if batch.last == refused:
        raise RecipeError(
            f"batch.last = {refused!r} does not go with order.name = {order!r}: "
            + ("its windows end with the epoch." if refused == "carry" else "its batches run on.")
            + " Take batch.last out."
        )
