"""Hugging Face data sets on disk, as `save_to_disk` of their `datasets` leaves them.

Nothing is downloaded: fetch the data set once with `datasets.load_dataset`, and save it. Columns
become arrays as those of Parquet do. `ab.steps` takes a `datasets.Dataset` itself, too, for what
has no fixed shape or does not fit in memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybatch.data.arrays import Examples
from anybatch.data.arrow import Columns, is_text
from anybatch.errors import DataError
from anybatch.extras import import_extra
from anybatch.limits import check_files
from anybatch.paths import check_local

__all__ = ["load_hugging_face", "load_part"]


def load_hugging_face(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    weights: str | None = None,
    split: str | None = None,
) -> Examples:
    """Inputs and targets of a saved data set.

    Args:
        path: the folder that it was saved to.
        target, inputs, labels, weights: as in `load_parquet`.
        split: which part, such as "train", where several were saved together.

    Raises:
        DataError: the package is not installed; a folder that is missing or damaged, or has no
            such split; and what `load_parquet` refuses in columns.
    """
    data = load_part(path, split)
    table = data.with_format("arrow")[:]
    columns = Columns.of(path, table.schema, target, inputs, labels, weights)
    if labels is None and is_text(table.schema.field(target).type):
        raise columns.refused_text(table.column(target))
    found = next(columns.arrays([table]))
    return Examples.of(found["inputs"], found["targets"], found.get("weights"))


def load_part(path: str, split: str | None) -> Any:
    """Open a saved data set, or the part of it that `split` names.

    Raises:
        DataError: see `load_hugging_face`.
    """
    return _part(path, _loaded(path), split)


def _loaded(path: str) -> Any:
    what = "Hugging Face data sets are read by their package datasets"
    datasets = import_extra("datasets", "anybatch[huggingface]", what, DataError)
    check_local(path, "a saved data set", DataError)
    if not Path(path).is_dir():  # a name or an address would be looked up in the net
        raise DataError(
            f"{path} is no folder, expected one that a data set was saved to: "
            f"datasets.load_dataset(name).save_to_disk(folder), once and with a network."
        )
    check_files(path, DataError)
    try:
        return datasets.load_from_disk(str(Path(path).absolute()))
    except Exception as error:  # the bytes may be anything, and so may what they raise
        raise DataError(
            f"{path} holds no data set that can be read: {error}. Was it saved with save_to_disk, "
            f"and copied whole?"
        ) from error


def _part(path: str, data: Any, split: str | None) -> Any:
    """The data set itself, or the part of a dict of them."""
    parts = sorted(data) if isinstance(data, dict) else []
    if split is None and not parts:
        return data
    if split not in parts:
        said = "is not said" if split is None else f"= {split!r}"
        holds = (
            f"it holds {', '.join(map(repr, parts))}" if parts else "it holds one data set alone"
        )
        raise DataError(
            f"{path}: data.args.split {said}, and {holds}. "
            + ("Name one of them." if parts else "Take split out.")
        )
    return data[split]
