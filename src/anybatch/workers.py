"""Read batches ahead of the loop in worker processes.

    worker k of W reads the steps  start + k, start + k + W, start + k + 2W, ...

A batch depends on its step alone, so the number of workers does not change it. A worker has one
thread, and leaves Ctrl-C to the training process.
"""

import pickle
import signal
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from traceback import extract_tb
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from anybatch import pytree
from anybatch.distributed.collectives import pickle_object
from anybatch.errors import AnybatchError, DataError

__all__ = ["IN_WORKER", "read_in_workers"]

IN_WORKER = "in a worker process"
"""Start of the note on an error that was raised in a worker."""


def read_in_workers(
    read: Callable[[int], Any], steps: Iterable[int], workers: int, *, seed: int, listed: bool
) -> Generator[Any, None, None]:
    """Yield `read(step)` for each step in order; closing the generator ends the workers.

    Args:
        read: runs in the workers.
        steps: to read.
        workers: number of processes, at least 1; each is up to 2 batches ahead.
        seed: of the workers' global generators; those of this process do not change.
        listed: whether `read` returns a list of examples and not a batch.

    Raises:
        Exception: an error of `read`, with a note of its place. DataError: a worker has died, or
            an error cannot be pickled.
    """
    loader = DataLoader(
        cast("Dataset[Any]", _Steps(read, listed)),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_return_unchanged,
        worker_init_fn=_begin_worker,
        generator=torch.Generator().manual_seed(seed),
    )
    try:
        for result in loader:
            if isinstance(result, _Failure):
                raise result.error
            yield pickle.loads(result) if listed else result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a process that reads data has died: {error}. Is memory short, /dev/shm included? "
            f"Take fewer workers, or workers=0 to see what happens."
        ) from error


@dataclass(frozen=True, slots=True)
class _Steps:
    """Data set for DataLoader in which a step is an index."""

    read: Callable[[int], Any]
    listed: bool

    def __getitem__(self, step: int) -> Any:
        try:
            result = self.read(step)
            if self.listed:
                # In shared memory each tensor of a list would need an open file.
                return pickle_object(result)
            # DataLoader drops what its queue cannot pickle, and the loop would wait for ever.
            pickle.dumps(pytree.map_leaves(lambda leaf: None, result))
            return result
        except Exception as error:  # DataLoader would replace it by another error
            return _Failure(_make_portable(error))


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


def _make_portable(error: Exception) -> Exception:
    """Return an error that survives pickling, with a note of the place where it was raised."""
    place = extract_tb(error.__traceback__)[-1]
    where = f"{IN_WORKER}, {place.filename}, line {place.lineno}, in {place.name}"
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            if not isinstance(error, AnybatchError):
                error.add_note(where)
            return error
    except Exception:  # its class may be local, or need other arguments than it stores
        pass
    return DataError(f"reading failed: {type(error).__name__}: {error} ({where}).")


def _return_unchanged(examples: Any) -> Any:
    return examples


def _begin_worker(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process ends its workers
