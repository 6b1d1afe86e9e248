"""State that the loop's body changes, besides weights and the optimiser's: for checkpoints.

    body          which parameters are trained, and which modules are in training mode
    generators    the global generators of torch, NumPy and `random`, which the body may draw from

The library itself draws from keys alone, and puts the generators back after each update. So what
they hold is the body's own, and differs between machines: it is no part of a run's digest.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from anybatch.compiled import unwrap

__all__ = ["body_of", "generators", "restore_body", "restore_generators"]


def body_of(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Read which parameters are trained and which modules are in training mode, by name."""
    model = unwrap(model)
    return {
        "is_trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "is_training": {name: module.training for name, module in model.named_modules()},
    }


def restore_body(model: nn.Module, state: Mapping[str, Mapping[str, bool]]) -> None:
    """Freeze, unfreeze and switch as `body_of` has read."""
    model = unwrap(model)
    for name, value in (*state["is_trained"].items(), *state["is_training"].items()):
        if type(value) is not bool:
            raise TypeError(f"whether {name} is trained is a {type(value).__name__}.")
    for name, p in model.named_parameters():
        if p.requires_grad != state["is_trained"].get(name, p.requires_grad):
            p.requires_grad_(not p.requires_grad)
    for name, module in model.named_modules():
        module.training = state["is_training"].get(name, module.training)


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
    """Put the global generators back to what `generators` has read."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"].cpu(), device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, spare = state["random"]
    if not (spare is None or type(spare) is float):  # Python itself would hand it out as a draw
        raise TypeError(f"the state of Python's generator holds a {type(spare).__name__}.")
    random.setstate((version, tuple(words.tolist()), spare))
