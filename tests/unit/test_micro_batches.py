"""A share that comes cut into batches, each with its own padding.

Oracle: plain autograd of each example by itself, without padding, in a loop.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

PAD = 0


class Tagger(nn.Module):
    """An embedding and a linear layer for each token."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.drop(self.embed(ids))))


def token_losses(model, batch):
    ids, labels = batch["ids"], batch["labels"]
    losses = F.cross_entropy(model(ids).mT, labels, reduction="none", ignore_index=-100)
    return ab.ExampleLosses(losses.sum(1), counts=(labels != -100).sum(1))


def make_model(dropout=0.0):
    torch.manual_seed(0)
    return Tagger(dropout).double()


def make_examples(number=9):
    torch.manual_seed(1)
    lengths = [5, 2, 7, 3, 3, 6, 1, 4, 8][:number]
    return [(torch.randint(1, 11, (n,)), torch.randint(4, (n,))) for n in lengths]


def pad(examples):
    def fill(rows, value):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids, labels = zip(*examples, strict=True)
    return {"ids": fill(list(ids), PAD), "labels": fill(list(labels), -100)}


def cut(examples, sizes):
    batches, start = [], 0
    for size in sizes:
        batches.append(pad(examples[start : start + size]))
        start += size
    return ab.MicroBatches(batches)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def per_example(model, examples):
    """Return the gradient of each example's summed loss, and its number of tokens."""
    gradients = []
    for example in examples:
        model.zero_grad()
        token_losses(model, pad([example])).values.sum().backward()
        gradients.append(gradient_of(model))
    model.zero_grad()
    return torch.stack(gradients), torch.tensor([len(ids) for ids, _ in examples])


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("sizes", [(9,), (3, 2, 4), (1,) * 9, (8, 1)], ids=str)
@pytest.mark.parametrize("layout", [None, ab.Layout(2)], ids=["as it comes", "cut again"])
def test_pieces_with_their_own_padding_have_the_gradient_of_the_batch(sizes, layout):
    model, examples = make_model(), make_examples()
    rows, counts = per_example(model, examples)

    gradient = ab.batch_gradient(
        model,
        ab.Objective(token_losses),
        cut(examples, sizes),
        layout=layout,
        observe=ab.Observe(norms=True, share=True),
    )

    assert distance(gradient_of(model), rows.sum(0) / counts.sum()) < 1e-12
    assert torch.allclose(gradient.ledger.norms, rows.norm(dim=1) / counts, rtol=1e-10)
    assert gradient.ledger.share.sum() == pytest.approx(1, abs=1e-12)
    assert gradient.num_examples == 9


def test_the_mean_of_the_pieces_means_is_another_gradient():  # the control
    model, examples = make_model(), make_examples()
    rows, counts = per_example(model, examples)
    for batch in cut(examples, (3, 2, 4)).batches:
        losses = token_losses(model, batch)
        (losses.values.sum() / losses.counts.sum() / 3).backward()
    assert distance(gradient_of(model), rows.sum(0) / counts.sum()) > 0.05


@pytest.mark.parametrize("reduction", [ab.TopFraction(0.4), ab.Max(), ab.Tilted(2.0)], ids=str)
def test_reductions_with_two_passes(reduction):
    model, examples = make_model(), make_examples()
    objective = ab.Objective(token_losses, reduction=reduction)
    ab.batch_gradient(model, objective, pad(examples))
    whole = gradient_of(model)
    ab.batch_gradient(model, objective, cut(examples, (4, 1, 4)))
    assert distance(gradient_of(model), whole) < 1e-12


@pytest.mark.parametrize("sizes", [(4, 4, 2), (4, 4, 1), (4, 4)], ids=str)
def test_pieces_of_a_model_that_draws_are_its_grains(sizes):
    """Pieces of equal length, so that the whole batch can be compared."""
    model = make_model(dropout=0.5)
    torch.manual_seed(2)
    ids, labels = torch.randint(1, 11, (sum(sizes), 5)), torch.randint(4, (sum(sizes), 5))
    whole = {"ids": ids, "labels": labels}
    pieces = zip(ids.split(sizes), labels.split(sizes), strict=True)
    share = ab.MicroBatches([{"ids": i, "labels": y} for i, y in pieces])
    key = ab.Key(seed=3, step=0)

    ab.batch_gradient(model, ab.Objective(token_losses), share, key=key)
    from_pieces = gradient_of(model)
    ab.batch_gradient(model, ab.Objective(token_losses, grain=4), share, key=key)
    assert torch.equal(gradient_of(model), from_pieces)
    ab.batch_gradient(model, ab.Objective(token_losses, grain=2), share, key=key)
    assert distance(gradient_of(model), from_pieces) > 0.01  # other random numbers

    if sizes[-1] > 1:  # a last example alone would join the grain before it
        ab.batch_gradient(model, ab.Objective(token_losses, grain=4), whole, key=key)
        assert distance(gradient_of(model), from_pieces) < 1e-12


def test_ragged_pieces_are_grains_in_the_middle_too():
    """[3, 2, 4]: each piece draws as a batch of its own does, from the key of its place."""
    model, examples = make_model(dropout=0.5), make_examples()
    share = cut(examples, (3, 2, 4))
    objective = ab.Objective(token_losses, reduction=ab.Sum())
    ab.batch_gradient(model, objective, share, key=ab.Key(5, 0))
    result = gradient_of(model)

    total = torch.zeros_like(result)
    for grain, batch in enumerate(share.batches):
        model.zero_grad()
        torch.manual_seed(ab.Key(5, 0).grain(grain))
        token_losses(model, batch).values.sum().backward()
        total += gradient_of(model)
    assert distance(result, total) < 1e-12


def test_batch_normalisation_by_pieces():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    inputs, targets = torch.randn(10, 3).double(), torch.randn(10).double()

    def losses(model, batch):
        return (model(batch[0])[:, 0] - batch[1]) ** 2

    pieces = list(zip(inputs.split([4, 6]), targets.split([4, 6]), strict=True))
    for piece in pieces:
        (losses(model, piece).sum() / 10).backward()
    plain = gradient_of(model)
    ab.batch_gradient(model, ab.Objective(losses), ab.MicroBatches(pieces))
    assert distance(gradient_of(model), plain) < 1e-12


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ab.MicroBatches([]), ab.errors.BatchError, "The batch is empty"),
        (lambda: ab.MicroBatches([torch.ones(0, 3)]), ab.errors.BatchError, r"batches\[0\] holds"),
        (lambda: ab.MicroBatches(torch.ones(2, 3)), ab.errors.BatchError, "in a list"),
        (
            lambda: ab.MicroBatches([ab.MicroBatches([torch.ones(2, 3)])]),
            ab.errors.BatchError,
            r"batches\[0\] is itself MicroBatches",
        ),
        (lambda: ab.MicroBatches([{"a": 3}]), ab.errors.BatchError, r"batches\[0\]\['a'\] is the"),
    ],
    ids=["none", "empty piece", "tensor", "nested", "number"],
)
def test_what_is_no_list_of_batches_is_refused(make, error, message):
    model = nn.Linear(3, 1)
    objective = ab.Objective(lambda model, batch: model(batch)[:, 0] ** 2)
    with pytest.raises(error, match=message):
        ab.batch_gradient(model, objective, make())


@pytest.mark.parametrize(
    ("micro_batch", "message"),
    [("auto", "cut already"), ((4, 5), "go beyond the pieces"), ((3, 2, 4, 1), "go beyond")],
    ids=str,
)
def test_a_layout_that_joins_pieces_is_refused(micro_batch, message):
    share = cut(make_examples(), (3, 2, 4))
    with pytest.raises(ab.errors.LayoutError, match=message):
        ab.batch_gradient(
            make_model(), ab.Objective(token_losses), share, layout=ab.Layout(micro_batch)
        )


def test_a_layout_that_cuts_grains_is_refused():
    share = cut(make_examples(), (4, 5))
    with pytest.raises(ab.errors.LayoutError, match="a micro-batch holds 3"):
        ab.batch_gradient(
            make_model(0.5),
            ab.Objective(token_losses, grain=4),
            share,
            key=ab.Key(0, 0),
            layout=ab.Layout(3),
        )


def make_step(model, divide):
    def step(micro_batches):
        model.zero_grad()
        all_losses = [token_losses(model, batch) for batch in micro_batches]
        total = sum(losses.counts.sum() for losses in all_losses)
        for losses in all_losses:
            count = total if divide == "total" else len(all_losses) * losses.counts.sum()
            (losses.values.sum() / count).backward()
        return model

    return step


def test_a_training_step_is_tried_on_pieces():
    share = cut(make_examples(), (3, 2, 4))
    ab.assert_layout_invariant(make_step(make_model(), "total"), share)
    with pytest.raises(AssertionError, match="micro"):  # the control
        ab.assert_layout_invariant(make_step(make_model(), "each"), share)
