"""Every reduction gives the same bits on 3 and 8 ranks, with all that changes an update.

Clipping, an augmentation, dropout, batch normalisation, a schedule, and a moving average of the
weights; GroupDRO's state and every loss are in the digest. Oracle: the same training in this
process alone, without ranks; there is no tolerance. Controls that must fail: a plain all-reduce of
each rank's own sum, by one pass and by two, and one reduction for another.
"""

import pickle

import pytest
import torch

import many_ranks
from anybatch.training.launch import launch
from many_ranks import REDUCTIONS, TRAININGS, WORLDS, train


@pytest.fixture(scope="module")
def results():
    """Collect the digest of each training, by rank."""
    return list(map(pickle.loads, launch(many_ranks.work, 8, imports=["many_ranks"])))


@pytest.fixture(scope="module", autouse=True)
def _threads_of_a_rank():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TRAININGS)
def test_many_ranks_end_in_the_bits_of_one_process(results, name):
    digests = {one[name, world] for one in results for world in WORLDS if (name, world) in one}
    assert digests == {TRAININGS[name](None)}


@pytest.mark.parametrize("name", ["Mean", "Tilted"])
def test_a_plain_all_reduce_ends_in_others(results, name):
    """Control."""
    (digest,) = {one["reduced", name] for one in results}
    assert digest != train(None, name)


def test_each_reduction_makes_another_training():
    """Control: what tells the oracle's cases apart."""
    assert len({train(None, name) for name in REDUCTIONS}) == len(REDUCTIONS)
