"""Fixtures for tests of the kernels: no choices beforehand, and a distance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from torch import Tensor

from anybatch.kernels import choice as kernels
from anybatch.kernels import operations as faster

__all__ = ["ROUNDING", "distance", "forget", "fresh", "seeded"]

seeded = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROUNDING = 1e-5  # of float32 sums of up to some hundred terms, norm over norm; about 100 eps


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Forget all choices, use an empty cache folder, and treat no product as too small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "SMALL", 1)
    monkeypatch.setattr(faster, "SMALL", 1)
    monkeypatch.setattr(faster, "_WORTH", 1)
    forget()
    yield
    forget()
    kernels.use("torch")


def forget() -> None:
    """Forget all choices, as in a new process."""
    kernels.use("fastest")
    kernels.choices.clear()


def distance(result: Tensor, expected: np.ndarray[Any, Any]) -> float:
    """Norm of the difference over the norm."""
    expected = np.asarray(expected, np.float64)
    scale = max(float(np.linalg.norm(expected)), 1e-30)
    return float(np.linalg.norm(result.detach().double().numpy() - expected)) / scale
