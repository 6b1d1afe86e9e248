"""Measured times of compiled and plain updates, stored for the next training."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from anybatch.kernels.stored import read_choices, write_choices

__all__ = ["Choice", "hash_settings", "read_choice", "store_choice"]

_NAME = "compiled"  # of the file
_GAIN = 0.95  # compiled updates must take less than this share of the plain time


class Choice(NamedTuple):
    """Seconds of a plain and of a compiled update, and of compiling."""

    plain: float
    compiled: float
    compiling: float

    @property
    def is_faster(self) -> bool:
        """Return whether compiled updates are faster, by more than noise."""
        return self.compiled < _GAIN * self.plain

    def __str__(self) -> str:
        return (
            f"{self.compiled * 1e3:.3g} ms compiled, {self.plain * 1e3:.3g} ms plain, "
            f"{self.compiling:.3g} s of compiling"
        )


def hash_settings(settings: Mapping[str, Any], model: nn.Module) -> str:
    """Hash the settings of a run that the speed of an update depends on."""
    names = ("model", "example_losses", "reduction", "penalty", "optimizer", "clip")
    content = json.dumps([repr(model), *(settings[name] for name in names)])
    return hashlib.sha256(content.encode()).hexdigest()


def read_choice(key: str) -> Choice | None:
    """Read what an earlier training measured; None: nothing."""
    stored: Any = read_choices(_NAME).get(key)
    try:
        return Choice(*map(float, stored))
    except (TypeError, ValueError):  # none, or damaged
        return None


def store_choice(key: str, choice: Choice) -> None:
    """Store a measurement for later trainings."""
    write_choices(_NAME, {**read_choices(_NAME), key: list(choice)})
