"""GPT against its formulas in NumPy, one sequence and one position at a time.

Tolerance: 1e-12 relative in float64, where the order of sums alone differs.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.batch import Pad
from anybatch.errors import ModelError
from anybatch.zoo.gpt import gpt
from anybatch.zoo.losses import token_cross_entropy

SIZES = {"vocabulary": 11, "width": 12, "depth": 2, "heads": 3, "length": 7}


def model_of(**sizes: Any) -> nn.Module:
    """Build it in float64, with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    model = gpt(**{**SIZES, **sizes}).double()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(3))


def by_hand(model: nn.Module, ids: list[int], *, sees_what_follows: bool = False) -> np.ndarray:
    """Logits [T, V] of one sequence."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    heads, width = SIZES["heads"], SIZES["width"]
    d = width // heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    h = [p["tokens.weight"][i] + p["positions.weight"][t] for t, i in enumerate(ids)]
    for block in (f"blocks.{n}" for n in range(SIZES["depth"])):
        qkv = [linear(norm(x, f"{block}.norm1"), f"{block}.attention.qkv") for x in h]
        for t in range(len(h)):
            mixed = []
            for head in range(heads):
                q, *_ = (row[head * d : (head + 1) * d] for row in np.split(qkv[t], 3))
                calls = qkv if sees_what_follows else qkv[: t + 1]
                k = [np.split(x, 3)[1][head * d : (head + 1) * d] for x in calls]
                v = [np.split(x, 3)[2][head * d : (head + 1) * d] for x in calls]
                weights = np.exp([q @ key / math.sqrt(d) for key in k])
                mixed.append(sum(w * x for w, x in zip(weights, v, strict=True)) / weights.sum())
            h[t] = h[t] + linear(np.concatenate(mixed), f"{block}.attention.out")
        for t, x in enumerate(h):
            inside = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0"))
            h[t] = x + linear(inside, f"{block}.mlp.2")
    head = p.get("head.weight", p["tokens.weight"])
    return np.array([head @ norm(x, "norm") for x in h])


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_its_formula(tied: bool) -> None:
    model, ids = model_of(tied=tied), tokens(2, 6)
    result = model(ids).detach().numpy()
    for logits, row in zip(result, ids.tolist(), strict=True):
        np.testing.assert_allclose(logits, by_hand(model, row), rtol=1e-12, atol=1e-12)
        wrong = by_hand(model, row, sees_what_follows=True)  # control
        assert np.abs(logits[:-1] - wrong[:-1]).max() > 0.1


def test_tied_it_has_no_weights_of_its_own_for_the_logits() -> None:
    sizes = [sum(p.numel() for p in model_of(tied=tied).parameters()) for tied in (True, False)]
    assert sizes[1] - sizes[0] == 11 * 12
    assert "head.weight" not in model_of().state_dict()


def test_padding_leaves_the_losses_of_each_sequence_as_they_are() -> None:
    model = model_of()
    examples = [(tokens(n), tokens(n)) for n in (3, 7, 1, 5)]
    together = token_cross_entropy(model, Pad()(examples))
    assert together.counts.tolist() == [3, 7, 1, 5]
    alone = [token_cross_entropy(model, Pad()([one])).values for one in examples]
    torch.testing.assert_close(together.values, torch.cat(alone), rtol=1e-12, atol=0)


def test_initial_weights_are_those_of_gpt_2() -> None:
    torch.manual_seed(0)
    model = gpt(vocabulary=500, width=96, depth=8, length=50)
    scale = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, result in scale.items():  # of 4,800 draws or more: within 4 %, some 4 sigma
        added = name.endswith(("attention.out.weight", "mlp.2.weight"))
        assert result == pytest.approx(0.02 / 4 if added else 0.02, rel=0.04)
    assert len(scale) == 2 + 8 * 4
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]


def test_dropout_draws_by_grain_and_so_the_same_in_every_layout() -> None:
    model, batch = model_of(dropout=0.3), (tokens(8, 6), tokens(8, 6))
    objective = ab.Objective(token_cross_entropy, grain=2)
    gradients = []
    for layout, seed in ((None, 0), (4, 0), (None, 1)):
        key, cut = ab.Key(seed=seed, step=0), ab.Layout(micro_batch=layout)
        ab.batch_gradient(model, objective, batch, key=key, layout=cut)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    assert (gradients[2] - gradients[0]).norm() > 0.01 * gradients[0].norm()  # control
    model.eval()
    assert torch.equal(model(batch[0]), model(batch[0]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match=r"got 4 heads\. They must divide the width 10"):
        gpt(width=10, heads=4)
    with pytest.raises(ModelError, match=r"has 7 positions, but the sequences have 8 .*length"):
        model_of()(tokens(1, 8))
