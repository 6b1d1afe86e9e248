"""A model of torchtitan on the CPU: `make test-torchtitan` installs it, and runs this.

Oracle: plain autograd of the mean over all tokens. The model computes its rotations in float32,
which leaves 1e-9 of a gradient in float64. The control is the mean of the sequences' means.
"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch.nn.functional as F

from anybatch.training.launch import launch

pytestmark = pytest.mark.skipif(
    find_spec("torchtitan") is None, reason="torchtitan is missing: make test-torchtitan"
)
CUTS = (None, 1, 2, 3)


@pytest.fixture(scope="module")
def results():
    """Compute gradients and norms, by number of ranks, rank and cut."""
    import torchtitan_models

    two = launch(torchtitan_models.compute_all, 2, imports=["torchtitan_models"])
    return {1: [torchtitan_models.compute_all()], 2: two}


def compute_by_hand(sequences=slice(None)):
    import torchtitan_models as models

    model, (tokens, labels) = models.build(), models.make_batch()
    logits = model(tokens[sequences]).flatten(0, 1)
    F.cross_entropy(logits, labels[sequences].flatten()).backward()
    return models.flatten(model).numpy()


def distance(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_a_model_of_torchtitan_has_the_gradient_of_plain_autograd(results, cut, num_ranks):
    for ranks in results[num_ranks]:
        assert distance(ranks[cut][0], compute_by_hand()) < 1e-8


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_norms_are_those_of_single_sequences(results, cut, num_ranks):
    norms = np.concatenate([ranks[cut][1] for ranks in results[num_ranks]])
    expected = [np.linalg.norm(compute_by_hand(slice(i, i + 1))) for i in range(7)]
    assert norms == pytest.approx(expected, rel=1e-7)


def test_the_mean_of_the_sequences_means_is_another():  # the control
    wrong = np.mean([compute_by_hand(slice(i, i + 1)) for i in range(7)], axis=0)
    assert distance(wrong, compute_by_hand()) > 0.01
