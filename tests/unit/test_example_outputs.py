"""`ExampleLosses.outputs`: what the forward pass made, in the batch's order.

Oracle: the same model called on the whole batch, or on each example.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

X, Y = torch.linspace(-1, 1, 30).reshape(10, 3).double(), torch.arange(10) % 4
LAYOUTS = [None, ab.Layout(10), ab.Layout(4), ab.Layout(1), ab.Layout((1, 7, 2))]


def make_model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 4)).double()


def losses(model, batch):
    logits = model(batch[0])
    values = F.cross_entropy(logits, batch[1], reduction="none")
    return ab.ExampleLosses(values, outputs={"logits": logits})


def vector(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.TopFraction(0.3)], ids=str)
@pytest.mark.parametrize("observe", [None, ab.Observe()], ids=["plain", "observed"])
def test_outputs_are_in_the_batchs_order_and_change_no_gradient(layout, reduction, observe):
    model = make_model()
    with torch.no_grad():
        expected = model(X)

    gradient = ab.batch_gradient(
        model, ab.Objective(losses, reduction=reduction), (X, Y), layout=layout, observe=observe
    )
    logits = gradient.outputs["logits"]
    assert torch.allclose(logits, expected, rtol=0, atol=1e-14)
    assert not logits.requires_grad
    result = vector(model)

    def without(model, batch):
        return losses(model, batch).values

    ab.batch_gradient(model, ab.Objective(without, reduction=reduction), (X, Y), layout=layout)
    assert torch.allclose(result, vector(model), rtol=0, atol=1e-15)
    assert ab.batch_gradient(model, ab.Objective(without), (X, Y)).outputs == {}


def test_a_hidden_state_goes_on_into_the_next_update():
    """Truncated backpropagation through time: segments, the hidden state carried between them."""
    torch.manual_seed(0)
    rnn, series = nn.GRU(2, 3, batch_first=True).double(), torch.randn(6, 12, 2).double()
    start = torch.zeros(1, 6, 3).double()

    def step_losses(model, batch):
        inputs, hidden = batch
        outputs, last = model(inputs, hidden.transpose(0, 1).contiguous())
        return ab.ExampleLosses(
            outputs.square().sum((1, 2)), outputs={"hidden": last.transpose(0, 1)}
        )

    hidden = start.transpose(0, 1)
    for segment in series.split(4, dim=1):
        gradient = ab.batch_gradient(
            rnn, ab.Objective(step_losses), (segment, hidden), layout=ab.Layout(2)
        )
        hidden = gradient.outputs["hidden"]
    assert torch.allclose(hidden.transpose(0, 1), rnn(series, start)[1], atol=1e-14)


def test_outputs_of_several_shapes_are_one_an_example():
    """Each piece of `MicroBatches` has its own padding."""
    torch.manual_seed(0)
    embed = nn.Embedding(9, 2).double()
    batches = [torch.randint(9, (2, 5)), torch.randint(9, (3, 4))]

    def embed_losses(model, ids):
        vectors = model(ids)
        return ab.ExampleLosses(vectors.square().sum((1, 2)), outputs={"vectors": vectors})

    result = ab.batch_gradient(embed, ab.Objective(embed_losses), ab.MicroBatches(batches)).outputs
    rows = [row for batch in batches for row in embed(batch)]
    assert [row.shape for row in result["vectors"]] == [(5, 2)] * 2 + [(4, 2)] * 3
    assert all(map(torch.equal, result["vectors"], rows))


def test_with_several_terms_the_name_of_the_term_comes_first():
    def two(model, batch):
        first = losses(model, batch)
        return {"task": first, "size": ab.ExampleLosses(first.values**2, outputs={"x": batch[0]})}

    objective = ab.Objective(two, reduction={"task": ab.Mean(), "size": 0.1 * ab.Mean()})
    outputs = ab.batch_gradient(make_model(), objective, (X, Y), layout=ab.Layout(4)).outputs
    assert sorted(outputs) == ["size.x", "task.logits"]
    assert torch.equal(outputs["size.x"], X)


def test_grains_draw_as_the_update_did():
    model = make_model(dropout=0.5)
    objective = ab.Objective(losses, grain=5)
    gradient = ab.batch_gradient(model, objective, (X, Y), key=ab.Key(1, 0))
    again = F.cross_entropy(gradient.outputs["logits"], Y, reduction="none")
    assert torch.allclose(again, gradient.losses.values, atol=1e-14)
    other = ab.batch_gradient(model, objective, (X, Y), key=ab.Key(2, 0))  # the control
    assert not torch.allclose(other.outputs["logits"], gradient.outputs["logits"])


def test_an_update_that_is_tried_again_has_them_once():
    """The first attempt shows that the model draws, and is given up."""

    def drawing(model, batch):
        hidden = F.dropout(torch.tanh(model[0](batch[0])), 0.5)  # no layer says so
        logits = model[3](hidden)
        values = F.cross_entropy(logits, batch[1], reduction="none")
        return ab.ExampleLosses(values, outputs={"logits": logits})

    objective = ab.Objective(drawing, grain=5)
    gradient = ab.batch_gradient(make_model(), objective, (X, Y), key=ab.Key(1, 0))
    assert gradient.outputs["logits"].shape == (10, 4)
    again = F.cross_entropy(gradient.outputs["logits"], Y, reduction="none")
    assert torch.allclose(again, gradient.losses.values, atol=1e-14)


def test_gather_keeps_them():
    gradient = ab.batch_gradient(make_model(), ab.Objective(losses), (X, Y), layout=ab.Layout(3))
    assert torch.equal(gradient.gather().outputs["logits"], gradient.outputs["logits"])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"h": torch.zeros(2, 10)}, r"'h' .* is a tensor of shape \(2, 10\).*10 examples as its"),
        ({"h": torch.zeros(())}, r"'h' .* is a tensor of shape \(\)"),
        ({"h": [0.0] * 10}, "'h' .* is list"),
        ([torch.zeros(10)], "outputs .* are of type list"),
    ],
    ids=["other dimension", "scalar", "list", "no dict"],
)
def test_outputs_without_examples_first_are_refused(outputs, message):
    def wrong(model, batch):
        return ab.ExampleLosses(losses(model, batch).values, outputs=outputs)

    with pytest.raises(ab.errors.LossError, match=message):
        ab.batch_gradient(make_model(), ab.Objective(wrong), (X, Y))
