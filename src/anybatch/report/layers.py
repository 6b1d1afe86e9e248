"""Size of an update, by parameter and within each parameter.

|G|, |grad Omega|, |U|, |w|, |dw|, |dw| / |w|        dw = w' - w
a picture of each parameter: the root mean square of U and dw over blocks of it
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.report.evidence import Evidence, norm
from anybatch.report.packing import pack

__all__ = ["describe_layers"]

MAX_SIDE = 40  # blocks along one side of a picture


def describe_layers(evidence: Evidence) -> dict[str, Any]:
    """Describe each parameter in a row, and the parts of the loss by name."""
    gradient = evidence.gradient
    figures: dict[str, Any] = {
        "loss": float(gradient.loss),
        "parts": [
            {"name": name, "value": float(value), "is_penalty": name not in gradient.terms}
            for name, value in gradient.parts.items()
        ],
        "metrics": {name: float(value) for name, value in gradient.metrics.items()},
    }
    if not evidence.update:
        return figures | {
            "why": "the gradients and weights are those of a model, which was not given: "
            "ab.explain(gradient, model=..., objective=..., batch=...)."
        }
    figures["rows"] = [_describe_row(name, evidence) for name in evidence.update]
    step = {name: w - evidence.before[name] for name, w in evidence.after.items()}
    figures["norms"] = {
        "data": norm(evidence.data),
        "penalty": norm(evidence.penalty),
        "update": norm(evidence.update),
        "weights": norm(evidence.before),
        "step": norm(step) if step else None,
    }
    return figures


def _describe_row(name: str, evidence: Evidence) -> dict[str, Any]:
    weight, update = evidence.before[name], evidence.update[name]
    layer, _, kind = name.rpartition(".")
    sizes = {
        "data": norm({name: evidence.data[name]}),
        "penalty": norm({name: evidence.penalty[name]}),
        "update": norm({name: update}),
        "weight": norm({name: weight}),
    }
    figures: dict[str, Any] = {
        "name": name,
        "layer": layer or "(model)",
        "kind": kind,
        "module": type(evidence.model.get_submodule(layer)).__name__ if evidence.model else "",
        "shape": list(weight.shape),
        "elements": weight.numel(),
        **sizes,
        "picture": _draw(update),
    }
    if evidence.after:
        step = evidence.after[name] - weight
        figures["step"] = norm({name: step})
        figures["relative"] = figures["step"] / sizes["weight"] if sizes["weight"] else None
        figures["step_picture"] = _draw(step)
    return figures


def _draw(values: Tensor) -> dict[str, Any]:
    """Compute the root mean square over blocks of a parameter as a matrix [first dim, others]."""
    square = values.detach().float().square().cpu()
    matrix = square.reshape(len(square), -1) if square.ndim > 1 else square.reshape(1, -1)
    blocks = [-(-side // MAX_SIDE) for side in matrix.shape]
    means = F.avg_pool2d(matrix[None], blocks, ceil_mode=True)[0] if max(blocks) > 1 else matrix
    return {"blocks": blocks, "values": pack(torch.sqrt(means))}
