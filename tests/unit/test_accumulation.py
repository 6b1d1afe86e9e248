"""Accumulation over several passes divides once, by the right count.

Oracle: plain autograd on the whole batch at once. Tolerance: 1e-12 as the norm of the difference
over the norm, in float64: only the order of summation differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.batch import Pad
from anybatch.data import load_text
from anybatch.data.text import load_lines
from anybatch.zoo import caffe_lenet, cross_entropy
from anybatch.zoo.gpt import gpt
from anybatch.zoo.losses import token_cross_entropy

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


def test_lines_padded_to_the_longest_of_each_micro_batch_have_the_token_mean_of_the_batch():
    lines = load_lines("pydoc_topics", length=80).select(torch.arange(40, 70))
    torch.manual_seed(0)
    model = gpt(width=8, depth=1, heads=2, length=80).double()
    cuts, paddings = (11, 1, 7, 3, 8), []
    hook = model.register_forward_pre_hook(lambda _, args: paddings.append(args[0].values.shape))
    objective, optimizer = ab.Objective(token_cross_entropy), torch.optim.SGD(model.parameters(), 0)
    order = ab.Order(30, batch_size=30, seed=0)
    for _ in ab.steps(
        model,
        objective,
        optimizer,
        lines,
        order=order,
        epochs=1,
        layout=ab.Layout(cuts),
        collate=Pad(),
    ):
        accumulated = flat_gradient(model)
    hook.remove()
    ids = order.indices(0).split(cuts)
    longest = [int(lines.lengths[part].max()) for part in ids]
    assert [tuple(shape) for shape in paddings[-5:]] == list(zip(cuts, longest, strict=True))
    assert len({*longest}) > 1

    def mean_over(part: Tensor) -> Tensor:
        """One line at a time, without a place of padding."""
        pairs = [lines[i] for i in part.tolist()]
        sums = [F.cross_entropy(model(x[None])[0], y, reduction="sum") for x, y in pairs]
        return sum(sums) / sum(len(y) for _, y in pairs)

    whole = by_autograd(model, mean_over(torch.arange(30)))
    assert distance(accumulated, whole) < BOUND
    mean_of_means = by_autograd(model, sum(map(mean_over, ids)) / len(cuts))
    assert distance(mean_of_means, whole) > 0.01  # the control
