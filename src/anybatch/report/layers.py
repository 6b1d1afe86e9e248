"""The size of an update, by parameter and within each parameter.

|G|, |grad Omega|, |U|, |w|, |dw|, |dw| / |w|        dw = w' - w
a picture of each parameter: the root mean square of U and dw over blocks of it
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.report.evidence import Evidence, norm
from anybatch.report.packing import packed

__all__ = ["layers"]

SIDE = 40  # blocks along one side of a picture, at most


def layers(evidence: Evidence) -> dict[str, Any]:
    """Gather a row per parameter, and the parts of the loss by name."""
    gradient = evidence.gradient
    found: dict[str, Any] = {
        "loss": float(gradient.loss),
        "parts": [
            {"name": name, "value": float(value), "is_penalty": name not in gradient.terms}
            for name, value in gradient.parts.items()
        ],
        "metrics": {name: float(value) for name, value in gradient.metrics.items()},
    }
    if not evidence.update:
        return found | {
            "why": "the gradients and weights are those of a model, which was not given: "
            "ab.explain(gradient, model=..., objective=..., batch=...)."
        }
    found["rows"] = [_row(name, evidence) for name in evidence.update]
    found["norms"] = {
        "data": norm(evidence.data),
        "penalty": norm(evidence.penalty),
        "update": norm(evidence.update),
        "weights": norm(evidence.before),
        "step": norm(_moved(evidence)) if evidence.after else None,
    }
    return found


def _moved(evidence: Evidence) -> dict[str, Tensor]:
    return {name: w - evidence.before[name] for name, w in evidence.after.items()}


def _row(name: str, evidence: Evidence) -> dict[str, Any]:
    weight, update = evidence.before[name], evidence.update[name]
    layer, _, kind = name.rpartition(".")
    sizes = {
        "data": norm({name: evidence.data[name]}),
        "penalty": norm({name: evidence.penalty[name]}),
        "update": norm({name: update}),
        "weight": norm({name: weight}),
    }
    found: dict[str, Any] = {
        "name": name,
        "layer": layer or "(model)",
        "kind": kind,
        "module": type(evidence.model.get_submodule(layer)).__name__ if evidence.model else "",
        "shape": list(weight.shape),
        "elements": weight.numel(),
        **sizes,
        "picture": _picture(update),
    }
    if evidence.after:
        step = evidence.after[name] - weight
        found["step"] = norm({name: step})
        found["relative"] = found["step"] / sizes["weight"] if sizes["weight"] else None
        found["step_picture"] = _picture(step)
    return found


def _picture(values: Tensor) -> dict[str, Any]:
    """Take the root mean square over blocks of a parameter, a matrix by its first dimension."""
    square = values.detach().float().square().cpu()
    matrix = square.reshape(len(square), -1) if square.ndim > 1 else square.reshape(1, -1)
    blocks = [-(-side // SIDE) for side in matrix.shape]
    means = F.avg_pool2d(matrix[None], blocks, ceil_mode=True)[0] if max(blocks) > 1 else matrix
    return {"blocks": blocks, "values": packed(torch.sqrt(means))}
