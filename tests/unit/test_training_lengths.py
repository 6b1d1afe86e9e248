"""`steps(steps=...)` and `len(steps(...))`."""

import itertools

import pytest
import torch
from torch import nn

import anybatch as ab

X, Y = torch.linspace(-1, 1, 46).reshape(23, 2).double(), torch.linspace(0, 1, 23).double()


def train(epochs=None, steps=None, run=None, **order):
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()

    def losses(model, batch):
        return (model(batch[0])[:, 0] - batch[1]) ** 2

    loop = ab.steps(
        model,
        ab.Objective(losses),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        (X, Y),
        order=ab.Order(23, batch_size=5, **order),
        epochs=epochs,
        steps=steps,
        run=run,
    )
    return model, loop


@pytest.mark.parametrize("last", ["keep", "carry", "drop"])
def test_a_number_of_updates_makes_those_of_the_epochs(last):
    model, loop = train(epochs=3, last=last)
    number = len(list(loop))
    other, loop = train(steps=number, last=last)
    assert len(list(loop)) == number
    assert torch.equal(model.weight, other.weight)


def test_a_run_goes_on_to_a_number_of_updates(tmp_path):
    straight, loop = train(steps=11)
    list(loop)
    _, loop = train(steps=7, run=ab.Run(tmp_path / "run", checkpoint_every=3))
    list(loop)
    model, loop = train(steps=11, run=tmp_path / "run")
    assert [step.step for step in loop] == [7, 8, 9, 10]
    assert torch.equal(model.weight, straight.weight)


@pytest.mark.parametrize("how", [{"epochs": 2}, {"steps": 7}], ids=str)
def test_the_length_is_the_number_of_iterations(how):
    _, loop = train(**how)
    number = len(loop)
    assert len(list(loop)) == number == (10 if "epochs" in how else 7)


def test_the_length_of_a_resumed_run_is_what_is_left(tmp_path):
    _, loop = train(epochs=4, run=ab.Run(tmp_path / "run", checkpoint_every=2))
    list(itertools.islice(loop, 5))
    loop.close()
    _, loop = train(epochs=4, run=tmp_path / "run")
    number = len(loop)
    assert number == 20 - 4  # the fifth update was not checkpointed
    next(loop)
    assert len(loop) == 15
    assert len(list(loop)) == 15


def test_a_loop_that_never_began_frees_its_run(tmp_path):
    _, loop = train(epochs=1, run=tmp_path / "run")
    loop.close()
    _, loop = train(epochs=1, run=tmp_path / "run")
    assert len(list(loop)) == 5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "got neither of epochs= and steps="),
        ({"epochs": 1, "steps": 3}, "got both of epochs= and steps="),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
    ],
    ids=str,
)
def test_other_numbers_are_refused(how, message):
    with pytest.raises(ab.errors.OrderError, match=message):
        train(**how)
