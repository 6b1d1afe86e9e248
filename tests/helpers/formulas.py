"""Reductions of the library, and the same formulas in plain torch, and a penalty written out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from cases import Values


def taking_part(message: Values) -> tuple[Tensor, Tensor]:
    """v and n of the examples with n_i > 0."""
    counts = torch.ones_like(message.values) if message.counts is None else message.counts
    return message.values[counts > 0], counts[counts > 0]


def mean(message):
    v, n = taking_part(message)
    return v.sum() / n.sum()


def maximum(message):
    v, n = taking_part(message)
    return (v / n).amax()  # torch shares the derivative of amax equally over ties


def top_fraction(message, q=0.3):
    v, n = taking_part(message)
    k, largest = max(q * len(v), 1.0), (v / n).sort(descending=True).values
    whole = int(k + 1e-9)
    rest = (k - whole) * largest[whole] if k - whole > 1e-9 else 0
    return (largest[:whole].sum() + rest) / k


def tilted(message, t=0.7):
    v, n = taking_part(message)
    return (t * v / n).exp().mean().log() / t


def group_dro(message, eta=0.5):
    v, n = taking_part(message)
    counts = torch.ones(len(message.values)) if message.counts is None else message.counts
    groups = message.groups[counts > 0]
    here = sorted(set(groups.tolist()))
    losses = torch.stack([v[groups == g].sum() / n[groups == g].sum() for g in here])
    weight = (eta * losses.detach()).softmax(0)
    return weight @ losses


def quadratic(message):
    v, n = taking_part(message)
    return (v * v).sum() / n.sum() + 0.1 * v.mean() ** 2


def info_nce(message):
    near = message.values @ message.values.T / 0.5
    near = near - 9 * torch.eye(len(near), dtype=near.dtype)
    return F.cross_entropy(near, (torch.arange(len(near)) + 1) % len(near))


def embeddings(model: nn.Module, batch: Any) -> Values:
    """[B, k] on the unit sphere, from the outputs of any problem's model."""
    outputs = model(batch[0])
    return Values(F.normalize(outputs.mean(1) if outputs.ndim == 3 else outputs, dim=1))


@dataclass(frozen=True)
class Scheme:
    """A reduction of the library and the same formula in torch."""

    reduction: Any
    formula: Callable[[Values], Tensor]
    pack: Callable[[Values], Any] = lambda message: ab.ExampleLosses(*message)
    tell: Callable[[nn.Module, Any], Values] | None = None


def square(message: Values) -> Values:
    return message._replace(values=message.values**2)


SCHEMES = {
    "mean": Scheme(ab.Mean(), mean),
    "sum": Scheme(ab.Sum(), lambda message: taking_part(message)[0].sum()),
    "max": Scheme(ab.Max(), maximum),
    "top fraction": Scheme(ab.TopFraction(0.3), top_fraction),
    "tilted": Scheme(ab.Tilted(0.7), tilted),
    "group dro": Scheme(ab.GroupDRO(0.5), group_dro),
    "function": Scheme(
        lambda losses: quadratic(Values(losses.values, losses.counts, losses.groups)), quadratic
    ),
    "scaled": Scheme(0.3 * ab.Mean(), lambda message: 0.3 * mean(message)),
    "terms": Scheme(
        {"data": ab.Mean(), "square": 0.2 * ab.Tilted(0.7)},
        lambda message: mean(message) + 0.2 * tilted(square(message)),
        pack=lambda message: {
            "data": ab.ExampleLosses(*message),
            "square": ab.ExampleLosses(*square(message)),
        },
    ),
    "contrastive": Scheme(
        lambda losses: info_nce(Values(losses.values)), info_nce, tell=embeddings
    ),
}


def add_penalty(model: nn.Module, formula: Callable[[Values], Tensor], message: Values) -> Tensor:
    """R + (0.1/2) sum w^2 over the weights + 0.05 sum |w| over the biases."""
    named = dict(model.named_parameters())
    squares = sum(p.square().sum() for name, p in named.items() if "weight" in name)
    sizes = sum(p.abs().sum() for name, p in named.items() if "bias" in name)
    return formula(message) + 0.05 * squares + 0.05 * sizes
