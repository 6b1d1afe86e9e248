"""Which columns of a table are inputs, target and weights, and text labels turned into classes.

    class of a label = its place in `labels`

A mapping is never guessed: text labels without `labels` are refused, and the sorted one offered.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anybatch.data.files import missing_column
from anybatch.errors import DataError

__all__ = ["chosen", "classes_of", "offer"]

NUM_SHOWN = 20  # distinct labels in a message


def chosen(
    path: str | Path,
    names: Sequence[str],
    target: str,
    inputs: str | Sequence[str] | None,
    weights: str | None = None,
) -> list[str]:
    """Names of the input columns: those asked for, by default all but target and weights.

    Raises:
        DataError: a column that is not there, is named twice, or is the target too; none at all.
    """
    others = [target] if weights is None else [target, weights]
    if inputs is None:
        wanted = [name for name in names if name not in others]
    else:
        wanted = [inputs] if isinstance(inputs, str) else list(inputs)
    for name in (*others, *wanted):
        if name not in names:
            raise missing_column(path, name, names)
    if target == weights:
        raise DataError(f"{target!r} is the target and the weights, expected a column for each.")
    if target in wanted:
        raise DataError(
            f"{target!r} is the target and an input, expected one of these: a model that is "
            f"shown its target learns nothing. Take it out of data.args.inputs."
        )
    if not wanted or len({*wanted}) < len(wanted):
        raise DataError(
            f"the inputs of {path} are {wanted}, expected at least one column, each once. "
            f"It has: {', '.join(map(repr, names))}."
        )
    return wanted


def classes_of(
    values: Sequence[str], labels: Sequence[str], place: Callable[[int], str]
) -> NDArray[np.int64]:
    """Text labels [N] as classes: each is its place in `labels`.

    Args:
        values: the label of each example.
        labels: the distinct labels, in the order of the classes.
        place: where in the file an example is, for the message.

    Raises:
        DataError: a label that is not in the list, or twice in it.
    """
    classes = {label: number for number, label in enumerate(labels)}
    if len(classes) < len(labels):
        raise DataError(f"data.args.labels = {list(labels)}: expected each label once.")
    for row, value in enumerate(values):
        if value not in classes:
            raise DataError(
                f"{place(row)}: the label {value!r} is not in data.args.labels = {list(labels)}. "
                f"Add it, or mend the row."
            )
    return np.array([classes[value] for value in values], np.int64)


def offer(path: str | Path, target: str, values: Iterable[str], first: str) -> DataError:
    """The error for text labels, with the mapping that would turn them into classes.

    Args:
        path, target: file and column.
        values: its labels.
        first: where the first label that is no number stands, and which it is.
    """
    distinct = sorted({*values})
    shown = distinct[:NUM_SHOWN]
    more = f", and {len(distinct) - len(shown)} more" if len(distinct) > len(shown) else ""
    return DataError(
        f"{path}: the target column {target!r} holds text ({first}), expected numbers or integer "
        f"classes. If these are labels, it has {len(distinct)} distinct ones, which sorted become "
        f"{', '.join(f'{label!r} = {number}' for number, label in enumerate(shown))}{more}. "
        f"To take them so, say data.args.labels = {shown!r}" + (" and so on." if more else ".")
    )
