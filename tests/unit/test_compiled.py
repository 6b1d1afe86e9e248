"""Compiled models: names, layouts and runs are those of the eager model.

Oracle: the same training of the eager model; with the backend "eager" torch compiles to the same
operations, so that bits agree.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 4, generator=generator), torch.randint(3, (24,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network(is_compiled):
    """Return the model that is trained, and the same model without compilation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return (torch.compile(model, backend="eager") if is_compiled else model), model


def train(is_compiled, folder, epochs):
    model, bare = network(is_compiled)
    steps = ab.steps(
        model,
        ab.Objective(losses, penalty=ab.L2(0.1, on="0.*")),
        torch.optim.Adam(model.parameters(), lr=0.01),
        data(),
        order=ab.Order(24, batch_size=8, seed=0),
        epochs=epochs,
        run=folder,
    )
    for _ in steps:
        pass
    return torch.cat([p.detach().flatten() for p in bare.parameters()])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_compiled_and_eager_runs_resume_each_other(first, second, tmp_path):
    whole = train(False, tmp_path / "whole", 2)
    half = train(first, tmp_path / "resumed", 1)
    assert not torch.equal(half, whole)  # the control: a resume has something to do
    assert torch.equal(train(second, tmp_path / "resumed", 2), whole)


def test_names_are_those_of_the_eager_model():
    model, bare = network(True)
    objective = ab.Objective(losses, penalty=ab.L2(0.1, on="2.weight"))
    gradient = ab.batch_gradient(
        model, objective, data(), observe=ab.Observe(parameter_norms=True), layout=ab.Layout(5)
    )
    assert list(gradient.ledger.parameter_norms) == [name for name, _ in bare.named_parameters()]
    with pytest.raises(ModelError, match=r"matches no trainable parameter.*0\.weight, 0\.bias"):
        ab.batch_gradient(model, ab.Objective(losses, penalty=ab.L2(1.0, on="5.*")), data())


def test_coupling_is_found_in_a_compiled_model():
    model, _ = network(True)

    def couple(model, batch):
        z = model(batch[0])
        return F.cross_entropy(z - z.mean(0), batch[1], reduction="none")

    with pytest.raises(ModelError, match="couples examples"):
        ab.batch_gradient(model, ab.Objective(couple), data(), layout=ab.Layout(6))
