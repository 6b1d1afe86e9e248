"""Watch for spikes on ranks: all name the same examples, as one process does.

Oracle: the same training in one process, and the training of the same ranks without the watch.
"""

import pickle
from functools import partial

import pytest
import torch

import anybatch as ab
import spikes_on_ranks
from anybatch.runs.records import read_records
from anybatch.training.launch import launch
from spikes_on_ranks import BAD


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spikes")
    launch(partial(spikes_on_ranks.work, folder), request.param, imports=["spikes_on_ranks"])
    ranks = [pickle.loads((folder / f"rank-{r}").read_bytes()) for r in range(request.param)]
    return folder, ranks


def test_all_ranks_name_the_examples_that_one_process_names(results):
    _, ranks = results
    texts, weights = spikes_on_ranks.train(None, ab.SpikeWatch(factor=3.0))
    assert any(f"example {BAD}:" in text for text in texts)
    for (theirs, same), *_, (of_one_rank, _) in ranks:
        assert of_one_rank == texts  # the other ranks have empty shares
        assert theirs == texts
        assert float((same - weights).norm() / weights.norm()) < 1e-12


def test_the_training_of_ranks_keeps_its_bits(results):
    _, ranks = results
    for (_, watched), (texts, plain), *_ in ranks:
        assert torch.equal(watched, plain)
        assert not texts


def test_earlier_visits_are_known_to_all_ranks_and_one_records(results):
    folder, ranks = results
    texts = [texts for _, _, (texts, _), *_ in ranks]
    assert all(other == texts[0] for other in texts)
    assert any("earlier visit" in text for text in texts[0])
    rows = [row for row in read_records(folder / "run/records.jsonl") if row["kind"] == "spike"]
    assert len(rows) == len(texts[0])


def test_shards_have_the_norm_of_the_whole_and_name_by_the_loss(results):
    _, ranks = results
    texts, _ = spikes_on_ranks.train(None, ab.SpikeWatch(factor=3.0))
    for *_, ((theirs, watched), (_, plain)), _ in ranks:
        assert theirs == ranks[0][3][0][0]
        assert torch.equal(watched, plain)
        assert [text.split("\n")[0] for text in theirs] == [text.split("\n")[0] for text in texts]
        assert any(f"example {BAD}:" in text for text in theirs)
        assert all("Norms and shares are missing" in text for text in theirs)
