"""Batches that worker processes read ahead of the loop, in order.

    worker k of W reads the steps  start + k, start + k + W, start + k + 2W, ...

Each batch is a function of its step alone, so it is the same whoever reads it. A worker has one
thread, and leaves Ctrl-C to the process that trains.
"""

import pickle
import signal
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from io import BytesIO
from traceback import extract_tb
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anybatch import pytree
from anybatch.errors import AnybatchError, DataError

__all__ = ["IN_WORKER", "read_in_workers"]

IN_WORKER = "in a worker process"
"""How the note of an error begins that was raised there."""


def read_in_workers(
    read: Callable[[int], Any], steps: Iterable[int], workers: int, *, seed: int, listed: bool
) -> Generator[Any, None, None]:
    """`read(step)` for each step, in order; closing it ends the workers.

    Args:
        read: runs in the workers.
        steps: which.
        workers: number of processes, at least 1; each is up to 2 batches ahead.
        seed: of the workers' own global generators; those of this process are left alone.
        listed: whether `read` returns a list of examples rather than a batch.

    Raises:
        Exception: what `read` has raised, with a note of where; DataError: a worker that has
            died, or an error that cannot be passed on as it is.
    """
    loader = DataLoader(
        cast("Dataset[Any]", _Steps(read, listed)),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin,
        generator=torch.Generator().manual_seed(seed),
    )
    try:
        for found in loader:
            if isinstance(found, _Failure):
                raise found.error
            yield pickle.loads(found) if listed else found
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a process that reads data has died: {error}. Is memory short, /dev/shm included? "
            f"Take fewer workers, or workers=0 to see what happens."
        ) from error


@dataclass(frozen=True, slots=True)
class _Steps:
    """What DataLoader takes for a data set: a step is an index."""

    read: Callable[[int], Any]
    listed: bool

    def __getitem__(self, step: int) -> Any:
        try:
            found = self.read(step)
            if self.listed:
                return _pickled(found)
            # A queue of DataLoader drops what it cannot pickle, and the loop would wait for ever.
            pickle.dumps(pytree.map_leaves(lambda leaf: None, found))
            return found
        except Exception as error:  # DataLoader would make another of it
            return _Failure(_portable(error))


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


def _portable(error: Exception) -> Exception:
    """The same error as it comes out of a pipe, with a note of where it was raised."""
    place = extract_tb(error.__traceback__)[-1]
    where = f"{IN_WORKER}, {place.filename}, line {place.lineno}, in {place.name}"
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            if not isinstance(error, AnybatchError):
                error.add_note(where)
            return error
    except Exception:  # its class may be local, or take other arguments than it keeps
        pass
    return DataError(f"reading failed: {type(error).__name__}: {error} ({where}).")


class _Pickler(pickle.Pickler):
    """Tensors as bytes: in shared memory each of a list would hold a file open."""

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not Tensor or thing.requires_grad or thing.layout != torch.strided:
            return NotImplemented
        content = thing.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (content, thing.dtype, thing.shape)


def _tensor(content: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _pickled(examples: Any) -> bytes:
    _Pickler(file := BytesIO(), pickle.HIGHEST_PROTOCOL).dump(examples)
    return file.getvalue()


def _as_it_is(examples: Any) -> Any:
    return examples


def _begin(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that trains ends its workers
