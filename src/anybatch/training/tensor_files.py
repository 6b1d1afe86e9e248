"""Tensors and plain values in one file of a checkpoint: by `torch.save`, and safely back."""

import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from anybatch.errors import CheckpointError
from anybatch.training.digest import nodes
from anybatch.training.disk import open_file
from anybatch.training.manifest import StoredFile

__all__ = ["Output", "load_value", "store", "store_value"]

_MOST_EXPANDED = 2**30  # bytes; a file of a few bytes could fill any memory


def load_value(data: bytes, path: Path) -> Any:
    """Load what a file holds, on the CPU; each tensor has memory of its own for each element.

    Args:
        data: content of the file.
        path: its name, for messages.

    Raises:
        CheckpointError: what could only be loaded by running code, or would fill the memory.
    """
    value = _unpickle(io.BytesIO(data), "cpu", path)
    return _without_expanded(value) if _list_expanded(value, path) else value


def store_value(path: Path, value: object) -> StoredFile:
    """Write tensors and plain values to a new file, and refuse what could not be loaded again."""
    stored = store(path, lambda out: torch.save(value, cast(IO[bytes], out)))
    with open_file(path, "rb") as file:
        _list_expanded(_unpickle(file, "meta", path), path)  # reads no elements
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


def _unpickle(file: IO[bytes], device: str, path: Path) -> Any:
    # No allow-list of our own: what rebuilds NumPy arrays could be led to forge memory.
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (MemoryError, OSError):
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


def _list_expanded(value: object, path: Path) -> list[str]:
    """The tensors in which several elements share memory; refuse those that are too large."""
    tensors = [(place, node) for place, node in nodes(value) if isinstance(node, Tensor)]
    expanded = [(place, tensor) for place, tensor in tensors if _is_expanded(tensor)]
    num_bytes = sum(tensor.nbytes for _, tensor in expanded)
    if num_bytes > _MOST_EXPANDED:
        place, tensor = max(expanded, key=lambda one: one[1].nbytes)
        raise CheckpointError(
            f"{path}: {place} is an expanded tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}: its elements share memory, and apart they would take "
            f"{num_bytes / 1e9:.1f} GB. At most {_MOST_EXPANDED / 1e9:.1f} GB are taken. Save the "
            f"part that is repeated; distrust the source of a file that you have not saved."
        )
    return [place for place, _ in expanded]


def _is_expanded(tensor: Tensor) -> bool:
    """Whether there are more elements than places in memory that they span."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) < tensor.numel()


def _without_expanded(value: Any) -> Any:
    """The same value with a copy of each expanded tensor."""
    if isinstance(value, Tensor):
        return value.contiguous() if _is_expanded(value) else value
    if isinstance(value, dict):
        return type(value)((key, _without_expanded(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_without_expanded, value))
    return value
