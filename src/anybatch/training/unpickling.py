"""Files of torch.save, loaded without running code and within the limits of their size."""

import os
import pickle
import re
from pathlib import Path
from typing import IO, Any, cast
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from anybatch.errors import CheckpointError
from anybatch.limits import check_unpacked, max_unpacked_bytes
from anybatch.training.digest import nodes

__all__ = ["is_expanded", "unpickle"]

_NODES = 10**6  # values that any file may hold, however small it is


def unpickle(file: IO[bytes], device: str, path: Path) -> Any:
    """The value in a file of torch.save.

    Raises:
        CheckpointError: a file that holds anything but tensors and plain values, or that unpacks
            into more than it can hold; nothing of it is run.
    """
    # No allow-list of our own: what rebuilds NumPy arrays could be led to forge memory.
    source = _Source(file)
    try:
        packed = _check_stored(cast(IO[bytes], source), path)
        value = torch.load(cast(IO[bytes], source), map_location=device, weights_only=True)
        _check_unpacked(value, packed, path)
        return value
    except (CheckpointError, MemoryError, OSError):
        raise
    except Exception as error:  # the bytes may be anything, and so may what they raise
        if source.error is not None:
            raise source.error from None
        found = str(error)
        if isinstance(error, pickle.UnpicklingError):  # a long text that advises to load unsafely
            culprit = re.search(r"GLOBAL \S+|Unsupported operand \d+", found)
            found = culprit[0] if culprit else "no pickle of these"
        raise CheckpointError(
            f"{path}: expected tensors and plain values, which load without running code; found "
            f"{found}, and ran nothing of it. In a file to load: distrust its source. In a state "
            f"to save: convert it first (NumPy by .item() or torch.from_numpy)."
        ) from error


class _Source:
    """A file that remembers why it could not be read: zipfile and torch.load hide that."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            raise

    def readinto(self, buffer: Any) -> Any:
        try:
            return self._file.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
    can stand in many places, and one number for all elements of a tensor."""
    unpacked = 0
    for number, (place, node) in enumerate(nodes(value)):
        if isinstance(node, Tensor):
            unpacked += node.nbytes
            _check_expanded(node, place, packed, unpacked, path)
        else:
            unpacked += 1
        if number % 1000 == 0 or isinstance(node, Tensor):
            check_unpacked(path, packed, unpacked, CheckpointError)
        if number > max(_NODES, packed):
            raise CheckpointError(
                f"{path} holds {packed} bytes that unpack into more values than that. "
                f"Use another checkpoint."
            )


def _check_expanded(tensor: Tensor, place: str, packed: int, unpacked: int, path: Path) -> None:
    """Refuse a tensor whose elements share memory, if they would take too much of it apart."""
    most = max_unpacked_bytes(packed)
    if unpacked > most and is_expanded(tensor):
        raise CheckpointError(
            f"{path}: {place} is an expanded tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}: its elements share memory, and apart they would take "
            f"{tensor.nbytes / 1e9:.1f} GB. A file of {packed} bytes may unpack into "
            f"{most / 1e9:.1f} GB at most. Save the part that is repeated; distrust the source of "
            f"a file that you have not saved."
        )


def is_expanded(tensor: Tensor) -> bool:
    """Whether there are more elements than places in memory that they span."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) < tensor.numel()
