"""Store tensors and plain values in one file of a checkpoint, and load them safely.

A file is written by `torch.save`. It is loaded without running code, and a small file cannot unpack
into more memory than `limits` allows.
"""

import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from anybatch.errors import CheckpointError
from anybatch.limits import check_unpacked, max_unpacked_bytes
from anybatch.runs.digest import walk_nodes
from anybatch.runs.disk import flush_file, open_file
from anybatch.runs.manifest import StoredFile

__all__ = ["Output", "load_value", "store", "store_value", "unpickle"]

_MAX_NODES = 10**6  # values that even the smallest file may hold


def load_value(data: bytes, path: Path) -> Any:
    """Load the content of a file on the CPU, with separate memory for each element of a tensor.

    Args:
        data: content of the file.
        path: its name, for messages.

    Raises:
        CheckpointError: loading would run code, or fill the memory.
    """
    return _copy_expanded(unpickle(io.BytesIO(data), "cpu", path))


def store_value(path: Path, value: object) -> StoredFile:
    """Write tensors and plain values to a new file, and check that they can be loaded again."""
    stored = store(path, lambda out: torch.save(value, cast(IO[bytes], out)))
    with open_file(path, "rb") as file:
        unpickle(file, "meta", path)  # the meta device reads no elements
    return stored


def store(path: Path, save: Callable[["Output"], object]) -> StoredFile:
    """Write one file, and flush it to the disk."""
    with open_file(path, "xb") as file:
        out = Output(file)
        try:
            save(out)
        except (RuntimeError, SystemError):
            # torch.save hides a failed write behind "unexpected pos" of its zip writer.
            if out.error is not None:
                raise out.error from None
            raise
        flush_file(file)
    return StoredFile(name=path.name, num_bytes=out.num_bytes, sha256=out.sha256.hexdigest())


class Output:
    """Writable file that counts and hashes its bytes, and remembers the error of a failed write."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | KeyboardInterrupt | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except (OSError, KeyboardInterrupt) as error:
            self.error = error
            raise
        self.num_bytes += len(data)
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def unpickle(file: IO[bytes], device: str, path: Path) -> Any:
    """Load a file of `torch.save` without running code.

    Raises:
        CheckpointError: the file holds anything but tensors and plain values, or it would unpack
            into too much memory.
    """
    # There is no list of further allowed classes. NumPy's reconstructor could be misused to read
    # memory that the file does not own.
    source = _Source(file)
    try:
        packed = _check_stored(cast(IO[bytes], source), path)
        value = torch.load(cast(IO[bytes], source), map_location=device, weights_only=True)
        if source.error is not None:  # torch drops an error of `readinto` and reads again
            raise source.error
        _check_unpacked(value, packed, path)
        return value
    except (CheckpointError, MemoryError, OSError):
        raise
    except Exception as error:  # damaged bytes may raise anything
        if source.error is not None:
            raise source.error from None
        content = str(error)
        if isinstance(error, pickle.UnpicklingError):  # its long text advises to load unsafely
            culprit = re.search(r"GLOBAL \S+|Unsupported operand \d+", content)
            content = culprit[0] if culprit else "no pickle of these"
        raise CheckpointError(
            f"{path}: expected tensors and plain values, which load without running code; found "
            f"{content}, and ran nothing of it. In a file to load: distrust its source. In a state "
            f"to save: convert it first (NumPy by .item() or torch.from_numpy)."
        ) from error


class _Source:
    """Readable file that remembers the error of a failed read: zipfile and torch.load hide it.

    A signal that arrives during a read is remembered too, or it would be taken for damage.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | KeyboardInterrupt | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except (OSError, KeyboardInterrupt) as error:
            self.error = error
            raise

    def readinto(self, buffer: Any) -> Any:
        try:
            return self._file.readinto(buffer)  # type: ignore[attr-defined]
        except (OSError, KeyboardInterrupt) as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _check_stored(file: IO[bytes], path: Path) -> int:
    """Check that nothing in the file is compressed, and return its number of bytes."""
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
    """Check that the values take no more memory than a file of this size may need.

    One value can be referred to from many places, and an expanded tensor repeats its elements.
    """
    unpacked = 0
    for number, (place, node) in enumerate(walk_nodes(value)):
        if isinstance(node, Tensor):
            unpacked += node.nbytes
            _check_expanded(node, place, packed, unpacked, path)
        else:
            unpacked += 1
        if number % 1000 == 0 or isinstance(node, Tensor):
            check_unpacked(path, packed, unpacked, CheckpointError)
        if number > max(_MAX_NODES, packed):
            raise CheckpointError(
                f"{path} holds {packed} bytes that unpack into more values than that. "
                f"Use another checkpoint."
            )


def _check_expanded(tensor: Tensor, place: str, packed: int, unpacked: int, path: Path) -> None:
    """Refuse an expanded tensor whose copy would take too much memory."""
    most = max_unpacked_bytes(packed)
    if unpacked > most and _is_expanded(tensor):
        raise CheckpointError(
            f"{path}: {place} is an expanded tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}: its elements share memory, and apart they would take "
            f"{tensor.nbytes / 1e9:.1f} GB. A file of {packed} bytes may unpack into "
            f"{most / 1e9:.1f} GB at most. Save the part that is repeated; distrust the source of "
            f"a file that you have not saved."
        )


def _is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements must share memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) < tensor.numel()


def _copy_expanded(value: Any) -> Any:
    """Replace each expanded tensor of a nested value by a copy."""
    if isinstance(value, Tensor):
        return value.contiguous() if _is_expanded(value) else value
    if isinstance(value, dict):
        return type(value)((key, _copy_expanded(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_copy_expanded, value))
    return value
