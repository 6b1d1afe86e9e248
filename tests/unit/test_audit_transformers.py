"""transformers 5.23.0, issue 47688: with K accumulation steps the gradient is K times too large.

`Trainer` takes `**kwargs` in the model's `forward` as a promise to divide by
`num_items_in_batch`, and then does not divide by the number of micro-batches itself.
`BertForSequenceClassification` passes the count on and returns the mean of its micro-batch.
It shows under Trainer's defaults, for batches with `labels`, without `compute_loss_func`, and
with `loss_is_scaled_for_ga` left None.
"""

import functools
import socket

import pytest
import torch
import torch.nn.functional as F

from anybatch.audit import assert_layout_invariant

transformers = pytest.importorskip("transformers", reason="the audit extra is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate; the audit extra is missing")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("these tests need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(32, (32, 8), generator=generator),
        "labels": torch.randint(3, (32,), generator=generator),
    }


def trainer_for(model, tmp_path, accumulation, **more):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1,
        save_strategy="no", max_grad_norm=0.0, dataloader_pin_memory=False,
        per_device_train_batch_size=32 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, **more)


def trainer_step(model, tmp_path, loss_is_scaled=None):
    """Run the inner loop of `Trainer._run_epoch`, from its prefetching to the last backward."""
    trainer_of = functools.cache(functools.partial(trainer_for, model, tmp_path))

    def step(micro_batches):
        trainer = trainer_of(len(micro_batches))
        trainer.loss_is_scaled_for_ga = loss_is_scaled
        model.zero_grad()
        samples, num_items = trainer.get_batch_samples(
            iter(micro_batches), len(micro_batches), trainer.args.device
        )
        trainer.current_gradient_accumulation_steps = len(samples)
        for inputs in samples:
            trainer.training_step(model, inputs, num_items)
        return model

    return step


def plain_step(model):
    def step(micro_batches):
        model.zero_grad()
        count = sum(len(part["labels"]) for part in micro_batches)
        for part in micro_batches:
            logits = model(part["input_ids"]).logits
            (F.cross_entropy(logits, part["labels"], reduction="sum") / count).backward()
        return model

    return step


def cut(batch, micro_batch):
    names, columns = batch.keys(), (column.split(micro_batch) for column in batch.values())
    return [dict(zip(names, part, strict=True)) for part in zip(*columns, strict=True)]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_trainer_fails_with_four_times_the_gradient_at_four_accumulation_steps(
    model, batch, tmp_path
):
    pattern = r"(?s)8\+8\+8\+8: 4\.000 times .*16\+16: 2\.000 times .*not divided by the number"
    with pytest.raises(AssertionError, match=pattern):
        assert_layout_invariant(trainer_step(model, tmp_path), batch, micro_batches=[8, 16])


def test_the_same_model_passes_in_a_right_plain_loop(model, batch):
    assert_layout_invariant(plain_step(model), batch)


def test_the_trainer_told_to_divide_is_right_but_for_ragged_ends(model, batch, tmp_path):
    step = trainer_step(model, tmp_path, loss_is_scaled=False)
    assert_layout_invariant(step, batch, micro_batches=[1, 8, 16])
    with pytest.raises(AssertionError, match=r"(?s)24\+8: .*a mean of means"):
        assert_layout_invariant(step, batch)


class KeepGradient(transformers.TrainerCallback):
    """Return the gradient of one update of `train()`, as its optimiser gets it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradient = gradient(model)


def gradient_of_train(model, data, tmp_path, accumulation):
    keep = KeepGradient()
    trainer_for(model, tmp_path, accumulation, train_dataset=data, callbacks=[keep]).train()
    return keep.gradient


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_step_audited_here_leaves_the_gradient_that_train_hands_to_its_optimiser(
    model, batch, tmp_path, accumulation
):
    # Oracle: Trainer.train() itself. Tolerance: float32 sums of 32 examples, which train()
    # shuffles; 4 against 1 accumulation steps would differ by a factor of 4.
    trainer_step(model, tmp_path)(cut(batch, 32 // accumulation))
    ours = gradient(model)
    data = [{name: column[0] for name, column in row.items()} for row in cut(batch, 1)]
    theirs = gradient_of_train(model, data, tmp_path, accumulation)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
