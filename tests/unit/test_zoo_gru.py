"""GRU classifier against torch's own formulas of a GRU, step by step in NumPy.

Tolerance: 1e-12 relative in float64, where the order of sums alone differs.
"""

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.batch import Pad
from anybatch.pytree import Uncollated
from anybatch.training.data_checks import check_padding
from anybatch.zoo.gru import gru_classifier
from anybatch.zoo.losses import cross_entropy

LENGTHS = (3, 9, 1, 5)


def model_of(depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return gru_classifier(7, width=5, classes=3, embedding=4, depth=depth).double()


def examples() -> list[tuple[torch.Tensor, int]]:
    sample = torch.Generator().manual_seed(1)
    return [(torch.randint(7, (n,), generator=sample), n % 3) for n in LENGTHS]


def by_hand(model: nn.Module, ids: list[int]) -> np.ndarray:
    """r, z, n and h' as torch.nn.GRU documents them; logits of the state after all ids."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    layer = [p["embedding.weight"][i] for i in ids]
    for depth in range(model.gru.num_layers):
        weight = {s: np.split(p[f"gru.weight_{s}_l{depth}"], 3) for s in ("ih", "hh")}
        bias = {s: np.split(p[f"gru.bias_{s}_l{depth}"], 3) for s in ("ih", "hh")}
        h, states = np.zeros(5), []
        for x in layer:
            i = [w @ x + b for w, b in zip(weight["ih"], bias["ih"], strict=True)]
            j = [w @ h + b for w, b in zip(weight["hh"], bias["hh"], strict=True)]
            r, z = (1 / (1 + np.exp(-(i[k] + j[k]))) for k in (0, 1))
            h = (1 - z) * np.tanh(i[2] + r * j[2]) + z * h
            states.append(h)
        layer = states
    return p["head.weight"] @ layer[-1] + p["head.bias"]


@pytest.mark.parametrize("depth", [1, 2])
def test_it_classifies_by_the_state_after_each_sequence(depth: int) -> None:
    model = model_of(depth)
    padded, _ = Pad()(examples())
    result = model(padded).detach().numpy()
    wanted = np.array([by_hand(model, ids.tolist()) for ids, _ in examples()])
    np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-13)
    last = model(padded.values).detach().numpy()  # control: without the mask, after the padding
    np.testing.assert_allclose(last[1], wanted[1], rtol=1e-12)
    assert np.abs(last - wanted)[[0, 2, 3]].max(1).min() > 1e-3


def test_it_does_not_read_padding() -> None:
    objective = ab.Objective(cross_entropy)
    assert check_padding(model_of().float(), objective, examples(), Pad())
    assert check_padding(model_of().float(), objective, examples(), Pad(fill=6))


def test_its_gradient_is_the_same_in_every_layout() -> None:
    model, objective = model_of(), ab.Objective(cross_entropy)
    gradients = []
    for cuts in (None, (1, 2, 1)):
        batch = Uncollated(examples(), Pad())
        ab.batch_gradient(model, objective, batch, layout=ab.Layout(micro_batch=cuts))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 1e-12 * gradients[0].norm()
