"""Draws of the loop's body on several ranks: kept where all ranks draw alike, else told.

Oracle: the same training in one go. Two processes over gloo, started once. Control: other seeds,
without a resume, draw other numbers.
"""

from functools import partial

import pytest
import torch

import drawing_ranks
from anybatch.training.launch import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("draws")


@pytest.fixture(scope="module")
def ranks(folder):
    return launch(partial(drawing_ranks.work, folder), 2, imports=["drawing_ranks"])


def generators(folder, name):
    (path,) = sorted(folder.glob(f"{name}/checkpoints/step-*/generators.pt"))[-1:]
    return torch.load(path, weights_only=True)


def test_draws_that_are_alike_on_all_ranks_come_back(ranks):
    for rank in ranks:
        weights, numbers, results = rank["resumed"]
        assert weights == rank["whole"][0] != rank["half"][0]
        assert rank["half"][1] + numbers == rank["whole"][1]
        assert not results


def test_a_run_of_two_ranks_goes_on_in_one_process_with_the_same_draws(ranks, folder):
    drawing_ranks.train(None, folder / "one", 2, seeds=(1, 1, 1), kinds=("torch", "random"))
    whole = drawing_ranks.train(None, folder / "all", 3, seeds=(1, 1, 1), kinds=("torch", "random"))
    kinds = ("torch", "random")
    resumed = drawing_ranks.train(None, folder / "one", 3, seeds=(2, 2, 2), kinds=kinds)
    other = drawing_ranks.train(None, folder / "other", 3, seeds=(2, 2, 2), kinds=kinds)
    assert resumed[1] == whole[1][-len(resumed[1]) :] != other[1][-len(resumed[1]) :]


def test_draws_of_each_rank_alone_are_told_and_not_kept(ranks, folder):
    results = [rank["own"][2] for rank in ranks]
    assert [len(one) for one in results] == [1, 0]  # by the first rank, once
    assert "draws from the generator of random and torch, whose state differs" in results[0][0]
    states = generators(folder, "own")
    assert states["torch"] is states["random"] is states["numpy"] is None


def test_draws_of_each_rank_alone_are_refused_where_bits_must_come_back(ranks, folder):
    for rank in ranks:
        (results,) = rank["own, bitwise"][2]
        assert results.startswith("refused: The loop's body draws from the generator of numpy")
    assert not list(folder.glob("b/checkpoints/step-*"))


def test_generators_that_differ_without_being_used_are_nobodys_concern(ranks, folder):
    assert not any(rank["undrawn"][2] for rank in ranks)
    assert not any(rank["partly"][2] for rank in ranks)
    states = generators(folder, "partly")
    assert states["torch"] is not None
    assert states["numpy"] is states["random"] is None


def test_a_mean_with_a_total_is_the_same_on_ranks(ranks):
    """Oracle: the equation by plain autograd, in one process."""
    torch.manual_seed(0)
    model, (inputs, targets) = torch.nn.Linear(4, 3).double(), drawing_ranks.data()
    values = torch.nn.functional.cross_entropy(
        model(inputs[:8].double()), targets[:8], reduction="none"
    )
    loss = 0.5 * (torch.arange(8.0) * values).sum() / (8 * 2.0)
    loss.backward()
    for rank in ranks:
        value, gradient = rank["total"]
        assert value == pytest.approx(loss.item(), rel=1e-12)
        result = torch.tensor(gradient, dtype=torch.float64)
        assert torch.allclose(result, model.weight.grad, 1e-12, 0)
