"""Small problems, and their gradient by plain autograd on the unsplit batch.

A problem yields plain tensors for its examples; `oracle` writes R and Omega out in torch over
the whole batch and differentiates once, with the generators seeded by hand and the buffers put
back for each grain. It uses nothing of the library.
"""

import copy
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED, STEP = 5, 3  # of the key


class Values(NamedTuple):
    """Values, counts and groups that the examples of a problem yield."""

    values: Tensor  # [B] or [B, k]
    counts: Tensor | None = None  # [B]
    groups: Tensor | None = None  # [B]


@dataclass(frozen=True)
class Problem:
    """A model, a batch, and what its examples yield."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    tell: Callable[[nn.Module, Any], Values]
    grain: int | None = None  # None: the model neither draws nor couples

    @property
    def size(self) -> int:
        return len(self.batch[0])


class Tagger(nn.Module):
    """Next token from an embedding, a GRU, and the embedding again as the head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids):
        return F.linear(self.gru(self.embedding(ids))[0], self.embedding.weight)


class Noisy(nn.Module):
    """Draws in a layer, inside a fused layer, in a function, from NumPy and from `random`."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, 2, dropout=0.3, batch_first=True)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.drop(self.lstm(x)[0][:, -1])
        h = F.dropout(h, 0.2, self.training) * (1 + np.random.rand())  # noqa: NPY002
        return self.head(h + random.random())


def weighted(model, batch):
    """Weighted cross-entropy; an example of weight 0 yields a loss all the same."""
    inputs, targets, weights, groups = batch
    each = F.cross_entropy(model(inputs), targets, reduction="none")
    return Values(each * weights.where(weights > 0, 1), weights, groups)


def drop_weights(model, batch):
    """Cross-entropy of inputs, targets and groups; every example counts once."""
    inputs, targets, groups = batch
    return Values(F.cross_entropy(model(inputs), targets, reduction="none"), None, groups)


def tokens(model, batch):
    """Cross-entropy of the unmasked tokens; of all, where every one is masked."""
    ids, following, mask, groups = batch
    each = F.cross_entropy(model(ids).transpose(1, 2), following, reduction="none")
    counted = mask.where(mask.any(1, keepdim=True), 1)
    return Values((each * counted).sum(1), mask.sum(1), groups)


def classifier(
    body: Callable[[], nn.Module], shape: tuple[int, ...], grain: int | None = None
) -> Callable[..., Problem]:
    """A builder of classification problems; weights are 0 for the examples of `absent`."""

    def build(size, dtype, seed, absent=None):
        torch.manual_seed(seed)
        model = body().to(dtype)
        inputs = torch.randn(size, *shape, dtype=torch.float64).to(dtype)
        targets, groups = torch.randint(3, (size,)), torch.randint(3, (size,))
        if absent is None:
            return Problem(model, (inputs, targets, groups), drop_weights, grain)
        weights = (torch.randint(1, 5, (size,)) / 2).to(dtype)
        weights[absent] = 0
        return Problem(model, (inputs, targets, weights, groups), weighted, grain)

    return build


def tagger(size, dtype, seed, absent=None):
    """A builder of token problems; the examples of `absent` have every token masked."""
    torch.manual_seed(seed)
    model = Tagger().to(dtype)
    ids = torch.randint(7, (size, 6))
    mask = (torch.rand(size, 5) < 0.7).to(dtype)
    mask[:, 0] = 1
    mask[[] if absent is None else absent] = 0
    return Problem(model, (ids[:, :-1], ids[:, 1:], mask, torch.randint(3, (size,))), tokens)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "linear": classifier(lambda: nn.Linear(5, 3), (5,)),
    "perceptron": classifier(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), (5,)
    ),
    "convolution": classifier(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.LocalResponseNorm(3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (2, 6, 6),
    ),
    "tokens": tagger,
    "layer norm": classifier(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), (5,)
    ),
    "batch norm": classifier(
        lambda: nn.Sequential(
            nn.Linear(5, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, 4),
            nn.BatchNorm1d(4, momentum=None),
            nn.Linear(4, 3),
        ),
        (5,),
        grain=3,
    ),
    "dropout": classifier(Noisy, (4, 5), grain=3),
}


def grain_edges(size: int, grain: int | None) -> list[int]:
    """Return where grains begin, and the end; a last single example joins its neighbour."""
    if grain is None:
        return [0, size]
    edges = [*range(0, size, grain), size]
    return [e for e in edges if not (e == size - 1 and e > 0 and e % grain == 0)]


def seed_by_hand(index: int) -> None:
    """Seed the global generators for one grain of the update (SEED, STEP)."""
    digest = hashlib.blake2b(f"{SEED},{STEP},{index}".encode(), digest_size=8).digest()
    seed = int.from_bytes(digest) >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


class Truth(NamedTuple):
    """Loss and gradient of the unsplit batch."""

    loss: Tensor
    gradient: Tensor  # flat, float64
    buffers: dict[str, Tensor]  # count-weighted mean over the grains


def oracle(problem: Problem, formula: Callable[[nn.Module, Values], Tensor]) -> Truth:
    """Loss and gradient of formula(model, what all examples yield), by one backward pass."""
    model = copy.deepcopy(problem.model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    after = {name: torch.zeros_like(b) for name, b in before.items()}
    message = []
    for index, (a, b) in enumerate(pairwise(grain_edges(problem.size, problem.grain))):
        for name, buffer in before.items():  # in a new tensor: the last grain's graph holds the old
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, buffer.clone())
        seed_by_hand(index)
        message.append(problem.tell(model, tuple(leaf[a:b] for leaf in problem.batch)))
        for name, now in model.named_buffers():
            after[name] = after[name] + now * ((b - a) / problem.size)
    loss = formula(model, Values(*(_concatenate(column) for column in zip(*message, strict=True))))
    loss.backward()
    return Truth(loss.detach(), flat_gradient(model), after)


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients in one float64 vector; zeros where autograd left none."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def distance(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((result - expected).norm() / expected.norm()).item()


def _concatenate(column: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if column[0] is None else torch.cat([t for t in column if t is not None])
