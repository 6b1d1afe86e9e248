"""Tensors and plain values in one file of a checkpoint: by `torch.save`, and safely back."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from anybatch.training.disk import open_file
from anybatch.training.manifest import StoredFile
from anybatch.training.unpickling import is_expanded, unpickle

__all__ = ["Output", "load_value", "store", "store_value"]


def load_value(data: bytes, path: Path) -> Any:
    """Load what a file holds, on the CPU; each tensor has memory of its own for each element.

    Args:
        data: content of the file.
        path: its name, for messages.

    Raises:
        CheckpointError: what could only be loaded by running code, or would fill the memory.
    """
    return _without_expanded(unpickle(io.BytesIO(data), "cpu", path))


def store_value(path: Path, value: object) -> StoredFile:
    """Write tensors and plain values to a new file, and refuse what could not be loaded again."""
    stored = store(path, lambda out: torch.save(value, cast(IO[bytes], out)))
    with open_file(path, "rb") as file:
        unpickle(file, "meta", path)  # reads no elements
    return stored


def store(path: Path, save: Callable[["Output"], object]) -> StoredFile:
    """Write one file through to the disk."""
    with open_file(path, "xb") as file:
        out = Output(file)
        try:
            save(out)
        except RuntimeError:
            # torch.save hides a failed write behind "unexpected pos" of its zip writer.
            if out.error is not None:
                raise out.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(name=path.name, num_bytes=out.num_bytes, sha256=out.sha256.hexdigest())


class Output:
    """A file that counts and hashes what is written to it, and remembers why it could not."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.num_bytes += len(data)
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _without_expanded(value: Any) -> Any:
    """The same value with a copy of each expanded tensor."""
    if isinstance(value, Tensor):
        return value.contiguous() if is_expanded(value) else value
    if isinstance(value, dict):
        return type(value)((key, _without_expanded(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_without_expanded, value))
    return value
