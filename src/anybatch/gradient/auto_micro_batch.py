"""Find the largest micro-batch that fits in memory, for micro_batch="auto".

On an accelerator by trying: the whole share first, and half as much whenever memory runs out, with
buffers and random state restored. On the CPU, where running out of memory kills the process, from
the peaks of growing passes, counted storage by storage. A peak is the largest of what the phases of
a pass hold,

    peak(b) = max over phases (fixed + b * per_example),    so    peak(c) <= (c/b) peak(b)

for c >= b, so each pass bounds the next one. By default half of the memory is used: freed tensors
leave holes, and the system's allocator may hold almost twice what is in use.
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

from anybatch import distributed
from anybatch._torch import TorchDispatchMode, tree_leaves
from anybatch.errors import LayoutError
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.result import Gradient
from anybatch.gradient.trial import preserve_everything, use_live_model
from anybatch.gradient.update import Update
from anybatch.layout import Layout
from anybatch.precision import autocast
from anybatch.pytree import copy_batch, prepare_batch, take_examples

__all__ = ["PeakBytes", "compute_with_most", "count_free_bytes"]


def compute_with_most(
    update: Update, layout: Layout, compute: Callable[[Layout], Gradient]
) -> Gradient:
    """Compute with the largest micro-batch that fits.

    Raises:
        LayoutError: not even one example, or one grain, fits.
    """
    sizes = distributed.all_gather_object(lambda: _choose_first_size(update, layout), update.group)
    largest_fit = layout.at_most or 0  # unless this update shows otherwise
    while True:
        size = sizes[distributed.get_rank(update.group)]
        try:
            gradient = compute(replace(layout, at_most=size))
            return replace(gradient, micro_batch=max(size, largest_fit))
        except torch.OutOfMemoryError as error:
            update.writes.check_repeatable()
            reason = update.find_grain_reason()
            if reason is not None or max(sizes) <= 1:
                raise _refuse_size(reason) from error
        if update.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes, largest_fit = [(size + 1) // 2 for size in sizes], 0


def _refuse_size(reason: str | None) -> LayoutError:
    if reason is None:
        return LayoutError(
            "A single example does not fit in memory. Use a smaller model, shorter examples or "
            "activation checkpointing."
        )
    return LayoutError(
        f"{reason}, so the model runs in grains, and one grain does not fit in memory. "
        f"Declare a smaller one, Objective(grain=...), or use activation checkpointing."
    )


def _choose_first_size(update: Update, layout: Layout) -> int:
    share = update.share_range.size
    if layout.at_most is not None:
        return max(min(layout.at_most, share), 1)
    if update.device.type != "cpu" or share <= 1 or update.find_grain_reason() is not None:
        return max(share, 1)
    limit = count_free_bytes() // 2 if layout.memory_bytes is None else layout.memory_bytes
    size = 1
    while True:
        last = size
        try:
            size = min(max(last * limit // _measure_peak(update, last), 1), share)
        except torch.OutOfMemoryError:
            return last  # the update itself reports it
        if size == share or size <= 1.2 * last:
            num_micro_batches = -(-share // size)
            return -(-share // num_micro_batches)  # micro-batches of about equal size


def _measure_peak(update: Update, num_examples: int) -> int:
    """Measure the peak bytes of a forward and backward pass over the first examples."""
    batch = prepare_batch(take_examples(update.share, 0, num_examples), update.device)
    accumulator = Accumulator(update.survey.parameters)
    hooked = update.survey.hooked
    no_hooks = ParameterHooks(hooked).disable() if hooked else nullcontext()
    try:
        with (
            use_live_model(update),
            preserve_everything(update),
            no_hooks,
            torch.enable_grad(),
            PeakBytes() as memory,
        ):
            accumulator.finish()
            accumulator.deliver()  # every micro-batch but the first finds sums in `.grad`
            with autocast(update.precision, update.device):
                losses = update.objective.losses(update.model, copy_batch(batch), num_examples)
            values = [term.values.sum() for term in losses.values() if term.values.requires_grad]
            if values:
                torch.autograd.backward(values)
    finally:
        accumulator.clear()
    return int(memory.peak)


class PeakBytes(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of the storages that operations create, and their peak.

    Example:
        >>> with PeakBytes() as memory:
        ...     _ = torch.ones(100) + 1
        >>> memory.peak
        800
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs = {s for s in _list_storages((args, kwargs)) if s not in self._known}
        result = func(*args, **(kwargs or {}))
        self._known.update(inputs)  # results that are views of inputs take no memory
        for storage in _list_storages(result):
            self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._subtract, num_bytes)

    def _subtract(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _list_storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count_free_bytes() -> int:
    """Return how many bytes this process may still use, within its control group."""
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
