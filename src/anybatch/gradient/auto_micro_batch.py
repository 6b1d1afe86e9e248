"""micro_batch="auto": as many examples at once as fit in memory.

On an accelerator by trying: the whole share first, and half as much whenever memory runs out,
with buffers and random state put back. On the CPU, where running out kills the process, from
the peaks of growing passes, counted storage by storage. A peak is the largest of what the
phases of a pass hold,

    peak(b) = max over phases (fixed + b * per_example),    so    peak(c) <= (c/b) peak(b)

for c >= b, and each pass says how far the next can go. By default half of the memory is used:
the system's allocator may hold almost twice what is in use, in holes left by freed tensors.
"""

import gc
import os
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch import distributed, pytree
from anybatch._torch import TorchDispatchMode, tree_leaves
from anybatch.errors import LayoutError
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.forward_writes import copy_of
from anybatch.gradient.parameter_hooks import hooks_of
from anybatch.gradient.result import Gradient
from anybatch.gradient.trial import live_subject, probing
from anybatch.gradient.update import Update
from anybatch.layout import Layout
from anybatch.precision import autocast

__all__ = ["PeakBytes", "as_much_as_fits", "memory_available"]


def as_much_as_fits(
    update: Update, layout: Layout, compute: Callable[[Layout], Gradient]
) -> Gradient:
    """Compute with the largest micro-batch that fits.

    Raises:
        LayoutError: not even one example, or one grain, fits.
    """
    sizes = distributed.all_gather_object(lambda: _first_size(update, layout), update.group)
    known = layout.at_most or 0  # fits, as long as nothing has shown otherwise
    while True:
        size = sizes[distributed.get_rank(update.group)]
        try:
            gradient = compute(replace(layout, at_most=size))
            return replace(gradient, micro_batch=max(size, known))
        except torch.OutOfMemoryError as error:
            update.writes.check_repeatable()
            why = update.find_grain_reason()
            if why is not None or max(sizes) <= 1:
                raise _too_large(why) from error
        if update.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes, known = [(size + 1) // 2 for size in sizes], 0


def _too_large(why: str | None) -> LayoutError:
    if why is None:
        return LayoutError(
            "a single example does not fit in memory: a smaller model, shorter examples "
            "or activation checkpointing would help."
        )
    return LayoutError(
        f"{why}, so the model runs in grains, and one grain does not fit in memory. "
        f"Declare a smaller one, Objective(grain=...), or use activation checkpointing."
    )


def _first_size(update: Update, layout: Layout) -> int:
    share = update.place.stop - update.place.start
    if layout.at_most is not None:
        return max(min(layout.at_most, share), 1)
    if update.device.type != "cpu" or share <= 1 or update.find_grain_reason() is not None:
        return max(share, 1)
    limit = memory_available() // 2 if layout.memory_bytes is None else layout.memory_bytes
    size = 1
    while True:
        tried = size
        try:
            size = min(max(tried * limit // _peak(update, tried), 1), share)
        except torch.OutOfMemoryError:
            return tried  # the update itself will find out
        if size == share or size <= 1.2 * tried:
            num_parts = -(-share // size)
            return -(-share // num_parts)  # parts of about equal size


def _peak(update: Update, num_examples: int) -> int:
    """Bytes that a forward and backward pass over the first examples holds at its height."""
    piece = pytree.prepare_batch(pytree.take_examples(update.share, 0, num_examples), update.device)
    accumulator = Accumulator(update.survey.parameters)
    hooks = hooks_of(update.survey.parameters)
    aside = nullcontext() if hooks is None else hooks.set_aside()
    try:
        with (
            live_subject(update),
            probing(update),
            aside,
            torch.enable_grad(),
            PeakBytes() as memory,
        ):
            accumulator.finish()
            accumulator.deliver()  # the sums are there in every part but the first
            with autocast(update.precision, update.device):
                losses = update.objective.losses(update.model, copy_of(piece), num_examples)
            values = [term.values.sum() for term in losses.values() if term.values.requires_grad]
            if values:
                torch.autograd.backward(values)
    finally:
        accumulator.clear()
    return int(memory.peak)


class PeakBytes(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of the storages that operations make, and their height."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {storage for storage in _storages((args, kwargs)) if storage not in self._seen}
        result = func(*args, **(kwargs or {}))
        self._seen.update(given)  # a view of what was there before is nothing new
        for storage in _storages(result):
            self._take_in(storage)
        return result

    def _take_in(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, num_bytes)

    def _let_go(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory_available() -> int:
    """Bytes that this process may still use, within its control group."""
    gc.collect()
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
