"""Global generators of torch, NumPy and `random`, which the loop's body may draw from.

The library itself draws from keys alone, and puts the generators back after each update. So what
they hold is the body's own, and differs between machines: it is no part of a run's digest.

Of several ranks, a checkpoint holds a generator that is in the same state on all of them. It holds
nothing of a single rank, since the number of ranks may change on resume.
"""

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import RunError
from anybatch.training.digest import digest

__all__ = ["common_generators", "digests_of", "generators", "restore_generators"]

_log = logging.getLogger(__name__)


def generators(device: torch.device) -> dict[str, Any]:
    """Read the states of the global generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    words_of_numpy = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, words_of_numpy, *rest],
        "random": [version, torch.tensor(words, dtype=torch.int64), spare],
    }


def restore_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the global generators back to what `generators` has read; None leaves one as it is."""
    if state["torch"] is not None:
        torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"].cpu(), device)
    if state["numpy"] is not None:
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if state["random"] is not None:
        version, words, spare = state["random"]
        if not (spare is None or type(spare) is float):  # Python itself would hand it out as a draw
            raise TypeError(f"the state of Python's generator holds a {type(spare).__name__}.")
        random.setstate((version, tuple(words.tolist()), spare))


def digests_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Compute the digest of each generator's state, by name."""
    return {name: digest(one) for name, one in state.items()}


def common_generators(
    state: Mapping[str, Any],
    at_start: Mapping[str, str],
    group: ProcessGroup,
    *,
    bitwise: bool,
) -> dict[str, Any]:
    """Leave out the generators that are not in the same state on all ranks; collective.

    Args:
        state: what `generators` has read on this rank.
        at_start: its digests when the loop began; a generator at which it differs has been used.
        bitwise: whether a resumed run must make the same draws.

    Raises:
        RunError: with bitwise, a generator that has been used and differs between ranks.
    """
    own = digests_of(state)
    used = [name for name in own if own[name] != at_start.get(name)]
    told = distributed.all_gather_object(lambda: (own, used), group)
    parted = [name for name in own if len({digests[name] for digests, _ in told}) > 1]
    lost = sorted({name for _, names in told for name in names if name in parted})
    if lost:
        what = (
            f"The loop's body draws from the generator of {' and '.join(lost)}, which is in "
            f"another state on each rank. No checkpoint holds what only one rank has, so a resumed "
            f"run draws other numbers. Seed it alike on all ranks, or draw from a generator that "
            f"is seeded with the step: torch.Generator().manual_seed(step.step)."
        )
        if bitwise:
            raise RunError(what)
        if distributed.get_rank(group) == 0:
            _log.warning(what)
    return {name: None if name in parted else one for name, one in state.items()}
