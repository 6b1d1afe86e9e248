"""Files of torch.save, loaded without running code and within the limits of their size."""

import os
import pickle
import re
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch

from anybatch.errors import CheckpointError
from anybatch.limits import check_unpacked
from anybatch.training.digest import walk

__all__ = ["unpickle"]

_NODES = 10**6  # values that any file may hold, however small it is


def unpickle(file: IO[bytes], device: str, path: Path) -> Any:
    """The value in a file of torch.save.

    Raises:
        CheckpointError: a file that holds anything but tensors and plain values, or that unpacks
            into more than it can hold; nothing of it is run.
    """
    # No allow-list of our own: what rebuilds NumPy arrays could be led to forge memory.
    try:
        packed = _check_stored(file, path)
        value = torch.load(file, map_location=device, weights_only=True)
        _check_unpacked(value, packed, path)
        return value
    except (CheckpointError, MemoryError, OSError):
        raise
    except Exception as error:  # the bytes may be anything, and so may what they raise
        found = str(error)
        if isinstance(error, pickle.UnpicklingError):  # a long text that advises to load unsafely
            culprit = re.search(r"GLOBAL \S+|Unsupported operand \d+", found)
            found = culprit[0] if culprit else "no pickle of these"
        raise CheckpointError(
            f"{path}: expected tensors and plain values, which load without running code; found "
            f"{found}, and ran nothing of it. In a file to load: distrust its source. In a state "
            f"to save: convert it first (NumPy by .item() or torch.from_numpy)."
        ) from error


def _check_stored(file: IO[bytes], path: Path) -> int:
    """See that nothing in the file is compressed, as torch.save writes it; its bytes."""
    if not is_zipfile(file):
        raise pickle.UnpicklingError("no archive")
    with ZipFile(file) as archive:
        if any(member.compress_type != ZIP_STORED for member in archive.infolist()):
            raise CheckpointError(
                f"{path} is compressed. Expected a file as torch.save writes it: this one might "
                f"unpack into any number of bytes. Use another checkpoint."
            )
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _check_unpacked(value: object, packed: int, path: Path) -> None:
    """See that tensors and containers are no more than the file can hold: one that is stored once
    can stand in many places."""
    unpacked = 0
    for number, node in enumerate(walk(value)):
        unpacked += node.nbytes if isinstance(node, torch.Tensor) else 1
        if number % 1000 == 0 or isinstance(node, torch.Tensor):
            check_unpacked(path, packed, unpacked, CheckpointError)
        if number > max(_NODES, packed):
            raise CheckpointError(
                f"{path} holds {packed} bytes that unpack into more values than that. "
                f"Use another checkpoint."
            )
