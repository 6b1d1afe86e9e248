"""IDX, the format of MNIST: one array a file, plain or gzipped.

    0x00 0x00 TYPE NDIM   size_1 .. size_NDIM   values

TYPE is 08 uint8, 09 int8, 0B int16, 0C int32, 0D float32, 0E float64; sizes are 4 bytes each;
sizes and values are big-endian, values in row-major order.

Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, "File formats".
"""

import gzip
import math
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.files import content_of
from anybatch.errors import DataError
from anybatch.limits import check_unpacked, most_unpacked

__all__ = ["load_idx", "read_idx"]

TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
GZIP = b"\x1f\x8b"


def load_idx(images: str, labels: str, scale: float | None = None) -> Examples:
    """Images [N, 1, H, W] and their classes [N].

    Args:
        images: file of three dimensions (N, H, W).
        labels: file of N integers.
        scale: what pixels are divided by; by default 255 for bytes, nothing for floats.

    Raises:
        DataError: a file that is missing, damaged, of another type or shape, or of another
            length than the other.
    """
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3:
        raise DataError(_misfit(images, pixels, "images of 3 dimensions (N, H, W)"))
    if classes.ndim != 1 or classes.dtype.kind == "f":
        raise DataError(_misfit(labels, classes, "labels: integers of 1 dimension (N)"))
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} holds {len(pixels)} images and {labels} {len(classes)} labels, expected as "
            f"many of each. Is one from the training set and one from the test set?"
        )
    return Examples.of(_scaled(images, pixels, scale)[:, None], classes)


def read_idx(path: str) -> NDArray[Any]:
    """The array of an IDX file, in the type and the sizes that it states.

    Raises:
        DataError: a file that is missing, damaged or of another format.
    """
    content = _unpacked(path)
    kind, ndim = content[2:3], content[3:4]
    if content[:2] != b"\0\0" or not ndim or kind[0] not in TYPES:
        raise DataError(
            f"{path} begins with the bytes {content[:4].hex(' ') or '(none)'}, expected those of "
            f"IDX: 00 00, a type (08, 09, 0b to 0e), the number of dimensions. Is it another file?"
        )
    dtype = np.dtype(TYPES[kind[0]])
    begin = 4 + 4 * ndim[0]
    if len(content) < begin:
        raise DataError(
            f"{path} holds {len(content)} bytes, expected a header of {begin} for its {ndim[0]} "
            f"dimensions. Is it cut off? Copy it again."
        )
    sizes = struct.unpack(f">{ndim[0]}I", content[4:begin])
    expected = begin + dtype.itemsize * math.prod(sizes)
    if len(content) != expected:
        raise DataError(
            f"{path} holds {len(content)} bytes, expected {expected} for its sizes {sizes} of "
            f"{dtype.name}. Is it {'cut off' if len(content) < expected else 'followed by others'}?"
            f" Copy it again."
        )
    return np.frombuffer(content, dtype, offset=begin).reshape(sizes)


def _unpacked(path: str) -> bytes:
    content = content_of(path, "an IDX file, plain or gzipped")
    if not content.startswith(GZIP):
        return content
    try:
        with gzip.GzipFile(fileobj=BytesIO(content)) as file:
            unpacked = file.read(most_unpacked(len(content)) + 1)
            check_unpacked(path, len(content), len(unpacked), DataError)
            return unpacked
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} is a gzip file that cannot be unpacked: {error}. Copy it again."
        ) from error


def _scaled(path: str, pixels: NDArray[Any], scale: float | None) -> NDArray[Any]:
    if scale is None:
        if pixels.dtype.kind == "i":
            raise DataError(
                f"{path} holds {pixels.dtype.name} pixels, whose range is not known, expected "
                f"uint8 or floats. Say what to divide them by: data.args.scale = 1, for instance."
            )
        scale = 255 if pixels.dtype.kind == "u" else 1
    if not 0 < scale < math.inf:
        raise DataError(f"data.args.scale = {scale}, expected a number above 0 to divide by.")
    floats: NDArray[np.floating] = pixels.astype(np.result_type(pixels.dtype, np.float32))
    return floats / np.asarray(scale, floats.dtype)


def _misfit(path: str, array: NDArray[Any], expected: str) -> str:
    return (
        f"{path} holds {array.dtype.name} of sizes {array.shape}, expected {expected}. "
        f"Are images and labels exchanged?"
    )
