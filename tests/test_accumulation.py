"""Accumulation over several passes divides once, by the right count.

Oracle: plain autograd on the whole batch at once. Tolerance: 1e-12 as the norm of the difference
over the norm, in float64: only the order of summation differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.data import load_text
from anybatch.zoo import caffe_lenet, cross_entropy

BOUND = 1e-12


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def by_autograd(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return flat_gradient(model)


def test_iter_size_4_at_batch_16_is_batch_64():
    torch.manual_seed(0)
    model = caffe_lenet(image=16).double()
    inputs, targets = torch.rand(64, 1, 16, 16).double(), torch.randint(10, (64,))
    ab.batch_gradient(
        model, ab.Objective(cross_entropy), (inputs, targets), layout=ab.Layout(micro_batch=16)
    )
    accumulated = flat_gradient(model)
    whole = by_autograd(model, F.cross_entropy(model(inputs), targets))
    assert distance(accumulated, whole) < BOUND
    undivided = by_autograd(
        model,
        sum(
            F.cross_entropy(model(inputs[i : i + 16]), targets[i : i + 16]) for i in (0, 16, 32, 48)
        ),
    )
    assert distance(undivided, 4 * whole) < BOUND  # the control: without iter_size's division


class NextToken(nn.Module):
    """An embedding and a linear head: each token predicts the next."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 8)
        self.head = nn.Linear(8, tokens)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.embedding(inputs))


def token_losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> ab.ExampleLosses:
    inputs, targets, mask = batch
    losses = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    return ab.ExampleLosses((losses * mask).sum(1), counts=mask.sum(1))


def test_on_ragged_text_the_token_mean_over_5_unequal_micro_batches_is_that_of_the_batch():
    torch.manual_seed(0)
    text = load_text("pydoc_topics", length=24)
    inputs, targets = text.inputs[:30], text.targets[:30]
    lengths = torch.randint(1, 25, (30,))
    mask = (torch.arange(24) < lengths[:, None]).double()
    model = NextToken(int(max(text.inputs.max(), text.targets.max())) + 1).double()
    cuts = (11, 1, 7, 3, 8)
    batch = (inputs, targets, mask)
    ab.batch_gradient(model, ab.Objective(token_losses), batch, layout=ab.Layout(cuts))
    accumulated = flat_gradient(model)

    def mean_over(rows: slice) -> Tensor:
        part = tuple(leaf[rows] for leaf in batch)
        losses = token_losses(model, part)
        return losses.values.sum() / losses.counts.sum()

    whole = by_autograd(model, mean_over(slice(None)))
    assert distance(accumulated, whole) < BOUND
    ends = torch.tensor(cuts).cumsum(0).tolist()
    rows = [slice(end - n, end) for n, end in zip(cuts, ends, strict=True)]
    mean_of_means = by_autograd(model, sum(mean_over(r) for r in rows) / len(cuts))
    assert distance(mean_of_means, whole) > 0.01  # the control
