"""Spikes in the real Trainer of transformers.

Oracle: the same training without the watch, bit for bit; the one that was not stopped.
"""

import pytest
import torch
import torch.nn.functional as F

import anybatch as ab

transformers = pytest.importorskip("transformers", reason="the transformers extra is missing")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from anybatch.integrations.transformers import ExactTrainer  # noqa: E402
from tiny_transformers import (  # noqa: E402
    InOrder,
    Sentences,
    arguments,
    bert,
    collate,
    flatten,
)


class Exact(InOrder, ExactTrainer):
    """Reads in the order of the data."""


class Marked(Sentences):
    """Sentences of which one is full of a token that multiplies its loss."""

    def __init__(self):
        super().__init__(120, "class")
        self.rows[BAD] = torch.full((16,), 39)


def mark_losses(model, batch):
    factor = 1 + 40 * ((batch["input_ids"] == 39).sum(1) > 10)
    outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    return factor * F.cross_entropy(outputs.logits, batch["labels"], reduction="none")


BAD = 117


def watch(folder, cut=(2, 2), spikes=None, **how):
    model = bert("SequenceClassification", dropout=0.1, num_labels=3)
    args = {"num_train_epochs": 2, "learning_rate": 0.01, **how}
    resume = args.pop("resume", None)
    trainer = Exact(
        model=model,
        args=arguments(folder, *cut, **args),
        train_dataset=Marked(),
        data_collator=collate,
        spikes=spikes,
        objective=ab.Objective(mark_losses),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_spike_names_the_example_and_changes_no_bit(tmp_path):
    trainer = watch(tmp_path, spikes=ab.SpikeWatch(factor=2.0))
    plain = watch(tmp_path)
    assert torch.equal(flatten(trainer.model), flatten(plain.model))
    assert plain.spikes == []
    names = {spike.step: [example.id for example in spike.examples] for spike in trainer.spikes}
    assert names[BAD // 4] == [BAD % 4]  # its place within its update of 4 examples
    example = next(e for s in trainer.spikes for e in s.examples if s.step == BAD // 4)
    assert example.share > 0.8
    assert any("its length is" in text for text in example.findings)
    assert any("its label is" in text for text in example.findings)


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_training_judges_the_same(tmp_path, restores):
    how = {"save_strategy": "steps", "save_steps": 25, "spikes": ab.SpikeWatch(factor=2.0)}
    whole = watch(tmp_path / "whole", **how)
    how |= {"restore_callback_states_from_checkpoint": restores}
    again = watch(tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-25"), **how)
    late = [str(spike) for spike in whole.spikes if spike.step >= 25]
    assert late
    assert [str(spike) for spike in again.spikes] == late
    third = watch(tmp_path / "third", resume=str(tmp_path / "again/checkpoint-50"), **how)
    assert [str(spike) for spike in third.spikes] == [
        str(spike) for spike in whole.spikes if spike.step >= 50
    ]
