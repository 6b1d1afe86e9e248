"""Several forward passes in one update: what a pass writes must not reach the next one.

Oracle: the batch as it was given, the weights, and the numbers of the generators.
"""

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError
from anybatch.runs.digest import digest, digest_run


@pytest.mark.parametrize("begins", [1, 3])
def test_a_draw_that_begins_later_is_not_repeated_over_a_batch_that_was_written_into(begins):
    """Check that a later update, which has no copy of its batch, cannot be repeated."""
    calls = []

    def losses(model, batch):
        batch[0].mul_(0.5)
        calls.append(1)
        noise = torch.rand(1) if len(calls) > begins else 0
        return model(batch[0] + 0 * noise)[:, 0]

    model, objective = nn.Linear(4, 1), ab.Objective(losses)
    for _ in range(begins):
        ab.batch_gradient(model, objective, (torch.ones(6, 4),), key=ab.Key(0, 0))
    with pytest.raises(ModelError, match=r"writes into its batch in place.*a second time"):
        ab.batch_gradient(model, objective, (torch.ones(6, 4),), key=ab.Key(0, 0))
    assert model.weight.grad is None


def shrink_weight(model, table):
    with torch.no_grad():
        model.weight.mul_(0.5)


def swap_weight(model, table):
    with torch.no_grad():
        model.weight.copy_(-model.weight)


def shrink_table(model, table):
    table.mul_(0.5)


def fill_entry(model, table):
    table[0] = 2.0


WRITES = {
    shrink_weight: "changes a parameter of the model .one of weight, bias",
    swap_weight: "changes a parameter of the model .one of weight, bias",
    shrink_table: "writes into an ab.Shared leaf",
    fill_entry: "writes into an ab.Shared leaf",
}


@pytest.mark.parametrize("begins", [1, 2])  # in the first update each pass has its own table
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_that_begins_at_any_update_of_a_cut_batch_is_refused(write, begins):
    calls = []

    def losses(model, batch):
        calls.append(1)
        if len(calls) > 2 * begins:  # two micro-batches an update
            write(model, batch["table"])
        return (model(batch["x"]) * batch["table"].sum())[:, 0]

    def run(layout):
        batch = {"x": torch.ones(6, 4), "table": ab.Shared(torch.ones(3))}
        ab.batch_gradient(model, ab.Objective(losses), batch, layout=layout, self_check=False)

    model, cut = nn.Linear(4, 1), ab.Layout(micro_batch=3)
    for _ in range(begins):
        run(cut)
    with pytest.raises(ModelError, match=WRITES[write]):
        run(cut)
    assert model.weight.grad is None
    run(None)  # the control: one forward pass may write


def test_the_digest_of_a_run_does_not_depend_on_the_generators_of_its_process():
    weights, first, second = torch.ones(3), torch.zeros(5), torch.ones(5)
    runs = [{"model": weights, "generators": states} for states in (first, second)]
    assert digest_run(runs[0]) == digest_run(runs[1])
    assert digest(runs[0]) != digest(runs[1])  # the control
    assert digest_run({"model": weights + 1, "generators": first}) != digest_run(runs[0])
