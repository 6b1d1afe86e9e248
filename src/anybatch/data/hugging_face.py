"""Hugging Face data sets on disk, as `save_to_disk` of the package `datasets` writes them.

Nothing is downloaded: fetch the data set once with `datasets.load_dataset`, and save it. Columns
become arrays as those of Parquet do. If examples have no fixed shape or do not fit in memory, pass
the `datasets.Dataset` itself to `ab.steps`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybatch.data.arrays import Examples
from anybatch.data.columns import Columns
from anybatch.errors import DataError
from anybatch.extras import import_extra
from anybatch.limits import check_files
from anybatch.paths import check_local

__all__ = ["load_hugging_face", "open_split"]


def load_hugging_face(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    weights: str | None = None,
    split: str | None = None,
) -> Examples:
    """Load inputs and targets of a saved data set.

    Args:
        path: the folder that it was saved to.
        target, inputs, labels, weights: as in `load_parquet`.
        split: name of the split, such as "train", if several were saved together.

    Raises:
        DataError: the package is not installed; a folder that is missing or damaged, or has no
            such split; columns that `load_parquet` refuses.
    """
    table = open_split(path, split).with_format("arrow")[:]
    columns = Columns.choose(path, table.schema, target, inputs, labels, weights)
    columns.check_target(table.schema, lambda: table.column(target))
    return columns.load(table)


def open_split(path: str, split: str | None) -> Any:
    """Open a saved data set, or a split of it."""
    data = _open(path)
    names = sorted(data) if isinstance(data, dict) else []
    if split is None and not names:
        return data
    if split in names:
        return data[split]
    setting = "is not set" if split is None else f"= {split!r}"
    if not names:
        raise DataError(
            f"{path}: data.args.split {setting}, but it holds one data set, without "
            f"splits. Take split out."
        )
    raise DataError(
        f"{path}: data.args.split {setting}. It holds {', '.join(map(repr, names))}. Name one of "
        f"them."
    )


def _open(path: str) -> Any:
    reason = "Hugging Face data sets are read by their package datasets"
    datasets = import_extra("datasets", "anybatch[huggingface]", reason, DataError)
    check_local(path, "a saved data set", DataError)
    if not Path(path).is_dir():  # load_from_disk would look up a name or an address in the net
        raise DataError(
            f"{path} is no folder. Name one that a data set was saved to: "
            f"datasets.load_dataset(name).save_to_disk(folder), once and with a network."
        )
    check_files(path, DataError)
    try:
        return datasets.load_from_disk(str(Path(path).absolute()))
    except Exception as error:  # damaged files may raise anything
        raise DataError(
            f"{path} holds no data set that can be read: {error}. Was it saved with save_to_disk, "
            f"and copied whole?"
        ) from error
