"""CIFAR-10 in its binary version: 32x32 images in colour, ten classes.

    file = row row ...      row = label (1 byte, 0 to 9), red (1024), green (1024), blue (1024)

Each colour is a plane of 32 rows of 32 bytes. data_batch_1.bin to data_batch_5.bin are the
training set, test_batch.bin is the test set.

Source: Krizhevsky 2009, Learning multiple layers of features from tiny images; the data set's
page, "Binary version".
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.files import read_bytes
from anybatch.errors import DataError
from anybatch.paths import check_local

__all__ = ["load_cifar10"]

ROW = 1 + 3 * 32 * 32
FILES = {
    "train": ("data_batch_*.bin",),
    "test": ("test_batch.bin",),
    "all": ("data_batch_*.bin", "test_batch.bin"),
}


def load_cifar10(folder: str, part: str = "train") -> Examples:
    """Load images [N, 3, 32, 32] scaled to 0 .. 1, and their classes.

    Args:
        folder: of the files, such as cifar-10-batches-bin.
        part: "train", "test" or "all" (both, in this order).

    Raises:
        DataError: another part, or files that are missing or damaged.
    """
    if part not in FILES:
        raise DataError(f"data.args.part = {part!r}. It must be one of {', '.join(FILES)}.")
    check_local(folder, "a folder of CIFAR-10", DataError)
    files: list[Path] = []
    for pattern in FILES[part]:
        matches = sorted(Path(folder).glob(pattern), key=lambda file: (len(file.name), file.name))
        if not matches:
            raise DataError(
                f"{folder} has no {pattern}. Name the folder of the binary version of CIFAR-10 "
                f"(cifar-10-batches-bin). Is it the version for Python or Matlab?"
            )
        files += matches
    rows = np.concatenate([_read_rows(file) for file in files])
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32)
    return Examples.from_arrays(pixels / 255, rows[:, 0])


def _read_rows(file: Path) -> NDArray[Any]:
    content = read_bytes(file, "a binary batch of CIFAR-10")
    if len(content) % ROW or not content:
        raise DataError(
            f"{file} holds {len(content)} bytes. It must hold a multiple of {ROW}: rows of a label "
            f"and 3 x 1024 pixels. Is it cut off? Copy it again."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, ROW)
    wrong = np.flatnonzero(rows[:, 0] > 9)
    if len(wrong):
        raise DataError(
            f"{file}: the label of row {wrong[0]} is {rows[wrong[0], 0]}. Labels are 0 to 9. Is it "
            f"CIFAR-100, whose rows begin with two labels, or another file?"
        )
    return rows
