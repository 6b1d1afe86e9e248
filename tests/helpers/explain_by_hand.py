"""Oracle of the figures of a page: each example by itself, by plain autograd, in a loop.

Nothing of the ledger, of the reductions or of `batch_gradient` is used here.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command_line import run_command, write_recipe

CODES = {"f8": "<f8", "f4": "<f4", "f2": "<f2", "u1": "u1", "u2": "<u2", "i4": "<i4"}

LENET: dict[str, dict[str, Any]] = {
    "model": {"name": "lenet", "args": {"image": 8}},
    "objective": {"loss": "cross_entropy", "penalty": [{"kind": "L2", "strength": 0.01}]},
    "optimizer": {"name": "sgd", "lr": 0.05, "args": {"momentum": 0.9}},
    "batch": {"size": 24},
    "run": {"epochs": 1, "threads": 1, "dtype": "float64", "checkpoint_every": 20, "keep": 3},
}
"""A recipe of 60 updates, in float64 so that rounding hides nothing."""

OBSERVED = {"observe": {"norms": True, "alignment": True, "share": True}}


def train_run(folder: Path, *, steps: int | None = None, **sections: Any) -> Path:
    """A run of the small recipe, some sections replaced."""
    folder.mkdir(exist_ok=True)
    recipe_file = write_recipe(folder, **{**LENET, **sections})
    run_command("train", recipe_file, "--out", folder / "run")
    return folder / "run"


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """An array as a page holds it."""
    content = base64.b64decode(packed["data"])
    return np.frombuffer(content, CODES[packed["dtype"]]).reshape(packed["shape"])


def data_of(html: str) -> dict[str, Any]:
    """Read the figures of a page."""
    figures = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL
    )
    assert figures is not None
    return json.loads(figures[1])


def each_gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
    """Compute the gradient of each example's own cross-entropy, by parameter."""
    names = [name for name, _ in model.named_parameters()]
    figures = []
    for x, y in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        figures.append(dict(zip(names, gradients, strict=True)))
    return figures


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def rows(each: list[dict[str, Tensor]]) -> Tensor:
    """[B, number of weights]."""
    return torch.stack([flat(one) for one in each])


def under(model: nn.Module, inputs: Tensor, targets: Tensor, reduce: Any) -> Tensor:
    """Compute the gradient of reduce(losses [B]), all weights in a row."""
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(reduce(losses), list(model.parameters()))]
    )


def distance(a: Any, b: Any) -> float:
    """Norm of the difference over the norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))
