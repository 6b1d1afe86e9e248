"""IDX, the format of MNIST: one array a file, plain or gzipped.

    0x00 0x00 TYPE NDIM   size_1 .. size_NDIM   values

TYPE is 08 uint8, 09 int8, 0B int16, 0C int32, 0D float32, 0E float64. Sizes are 4 bytes each. Sizes
and values are big-endian, values in row-major order.

Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, "File formats".
"""

import math
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.files import open_bytes, read_at_most
from anybatch.errors import DataError

__all__ = ["DEBIAN", "FASHION_MNIST", "load_fashion_mnist", "load_idx", "read_idx"]

MAX_HEADER = 4 + 4 * 255  # bytes
TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
DEBIAN = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


def load_idx(images: str, labels: str, scale: float | None = None) -> Examples:
    """Load images [N, 1, H, W] and their classes [N] from two files.

    Args:
        images: file of three dimensions (N, H, W).
        labels: file of N integers.
        scale: divisor of pixels; by default 255 for bytes, 1 for floats.

    Raises:
        DataError: a file that is missing, damaged, of another type or shape, or of another
            length than the other.
    """
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3:
        raise _make_shape_error(images, pixels, "images of 3 dimensions (N, H, W)")
    if classes.ndim != 1 or classes.dtype.kind == "f":
        raise _make_shape_error(labels, classes, "labels: integers of 1 dimension (N)")
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} holds {len(pixels)} images and {labels} {len(classes)} labels. There must "
            f"be as many of each. Is one from the training set and one from the test set?"
        )
    return Examples.from_arrays(_scale(images, pixels, scale)[:, None], classes)


def load_fashion_mnist(part: str = "train", folder: str = DEBIAN) -> Examples:
    """Load Fashion-MNIST: images [N, 1, 28, 28] scaled to 0 .. 1, and their ten classes.

    Args:
        part: "train" (N = 60,000), "test" (10,000) or "all" (both, in this order).
        folder: of the four gzipped IDX files, as Debian packs them.

    Raises:
        DataError: another part, or files that are missing or damaged.

    Source: Xiao, Rasul and Vollgraf 2017, 1708.07747; Debian's package dataset-fashion-mnist.
    """
    if part not in FASHION_MNIST:
        raise DataError(f"data.args.part = {part!r}. It must be one of {', '.join(FASHION_MNIST)}.")
    pieces = []
    for name in FASHION_MNIST[part]:
        images = Path(folder, f"{name}-images-idx3-ubyte.gz")
        labels = Path(folder, f"{name}-labels-idx1-ubyte.gz")
        for file in (images, labels):
            if not file.is_file():
                raise DataError(
                    f"{file} does not exist. It is a file of Debian's package "
                    f"dataset-fashion-mnist. Install it (apt install dataset-fashion-mnist), or "
                    f"name the folder that holds the files: data.args.folder = '...'."
                )
        pieces.append(load_idx(str(images), str(labels)))
    if len(pieces) == 1:
        return pieces[0]
    return Examples(*(torch.cat(both) for both in zip(*(x.columns for x in pieces), strict=True)))


def read_idx(path: str) -> NDArray[Any]:
    """Read the array of an IDX file, in the type and sizes of its header.

    Raises:
        DataError: a file that is missing, damaged or of another format.
    """
    with open_bytes(path, "an IDX file, plain or gzipped") as (file, _):
        return _read_array(path, file)


def _read_array(path: str, file: IO[bytes]) -> NDArray[Any]:
    content = read_at_most(file, MAX_HEADER)
    kind, ndim = content[2:3], content[3:4]
    if content[:2] != b"\0\0" or not ndim or kind[0] not in TYPES:
        raise DataError(
            f"{path} begins with the bytes {content[:4].hex(' ') or '(none)'}. An IDX file begins "
            f"with 00 00, a type (08, 09, 0b to 0e) and the number of dimensions. Is it another "
            f"file?"
        )
    dtype = np.dtype(TYPES[kind[0]])
    start = 4 + 4 * ndim[0]
    if len(content) < start:
        raise DataError(
            f"{path} holds {len(content)} bytes. The header alone has {start} for its {ndim[0]} "
            f"dimensions. Is it cut off? Copy it again."
        )
    sizes = struct.unpack(f">{ndim[0]}I", content[4:start])
    size = start + dtype.itemsize * math.prod(sizes)
    content += read_at_most(file, size + 1 - len(content))  # one more, to notice a longer file
    if len(content) != size:
        raise DataError(
            f"{path} holds {len(content)} bytes. It should hold {size} for its sizes {sizes} of "
            f"{dtype.name}. Is it {'cut off' if len(content) < size else 'followed by others'}? "
            f"Copy it again."
        )
    return np.frombuffer(content, dtype, offset=start).reshape(sizes)


def _scale(path: str, pixels: NDArray[Any], scale: float | None) -> NDArray[Any]:
    """Divide pixels, as floats."""
    if scale is None:
        if pixels.dtype.kind == "i":
            raise DataError(
                f"{path} holds {pixels.dtype.name} pixels, whose range is not known. Set their "
                f"divisor: data.args.scale = 1, for instance."
            )
        scale = 255 if pixels.dtype.kind == "u" else 1
    if not 0 < scale < math.inf:
        raise DataError(f"data.args.scale = {scale}. It must be a number above 0 to divide by.")
    floats: NDArray[np.floating] = pixels.astype(np.result_type(pixels.dtype, np.float32))
    return floats / np.asarray(scale, floats.dtype)


def _make_shape_error(path: str, array: NDArray[Any], requirement: str) -> DataError:
    return DataError(
        f"{path} holds {array.dtype.name} of sizes {array.shape}. It must hold {requirement}. Are "
        f"images and labels exchanged?"
    )
