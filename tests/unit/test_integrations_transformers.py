"""`ExactTrainer`, `ExactGradient` and `LedgerCallback` in the real Trainer of transformers.

Oracle: a loop by hand in float64 over the same examples, plain autograd of the mean over the whole
batch, each sentence padded to the longest of the batch. The control is the Trainer itself.
"""

import copy
import socket

import pytest
import torch
import torch.nn.functional as F

import anybatch as ab
from anybatch.errors import ModelError

transformers = pytest.importorskip("transformers", reason="the transformers extra is missing")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from anybatch.integrations.transformers import (  # noqa: E402
    ExactGradient,
    ExactTrainer,
    LedgerCallback,
    example_losses,
)
from tiny_transformers import (  # noqa: E402
    LABEL,
    InOrder,
    Sentences,
    arguments,
    bert,
    collate,
    distance,
    flatten,
    gpt2,
    t5,
)

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
TASKS = {
    "sequence": (lambda: bert("SequenceClassification", num_labels=3), "class"),
    "tokens": (lambda: bert("TokenClassification", num_labels=40), "some tokens"),
    "masked": (lambda: bert("MaskedLM"), "some tokens"),
    "causal": (gpt2, "tokens"),
    "seq2seq": (t5, "tokens"),
}


class Exact(InOrder, ExactTrainer):
    """Trainer in the order of the data, which stores the first gradient."""

    first = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.gradient is not None and self.first is None:
            self.first = flatten(self.model, gradient=True).clone()
        return loss


class Plain(InOrder, transformers.Trainer):
    """Control."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("these tests need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def compute_whole_loss(model, batch, smoothing=0.0):
    """Return the mean over examples or tokens of a whole batch, written out."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    name = type(model).__name__
    if name.startswith("T5"):
        inputs["decoder_input_ids"] = model._shift_right(labels)
    logits = model(**inputs).logits
    if name.startswith("GPT2"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return F.cross_entropy(*flat, ignore_index=LABEL, label_smoothing=smoothing)


def by_hand(model, data, epochs=2, size=8, clip=None, lr=0.1, smoothing=0.0):
    """Return the first gradient and the weights after plain SGD on whole batches."""
    model, first = copy.deepcopy(model).train(), None
    for _ in range(epochs):
        for start in range(0, len(data), size):
            rows = [data[i] for i in range(start, min(start + size, len(data)))]
            model.zero_grad()
            compute_whole_loss(model, collate(rows), smoothing).backward()
            if first is None:
                first = flatten(model, gradient=True).clone()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= lr * p.grad
    return first, flatten(model)


def train(kind, model, data, folder, cut, **how):
    more = {name: how.pop(name) for name in ("objective", "observe", "callbacks") if name in how}
    trainer = kind(
        model=model,
        args=arguments(folder, *cut, **how),
        train_dataset=data,
        data_collator=collate,
        **more,
    )
    trainer.train()
    return trainer


@pytest.mark.fast(3)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("make", "labels"), TASKS.values(), ids=TASKS)
def test_every_cut_has_the_gradient_of_the_whole_batch(tmp_path, make, labels, cut):
    data = Sentences(21, labels)  # the last window of an epoch holds 5
    first, end = by_hand(make(), data)
    trainer = train(Exact, make(), data, tmp_path, cut)
    limit = 1e-6 if labels == "tokens" and make is t5 else 1e-11  # T5's softmax is in float32
    assert distance(trainer.first, first) < limit
    assert distance(flatten(trainer.model), end) < limit
    assert trainer.gradient.num_examples == 5


def test_the_trainer_itself_does_not(tmp_path):  # the control
    make, labels = TASKS["sequence"]
    data = Sentences(21, labels)
    _, end = by_hand(make(), data)
    assert distance(flatten(train(Plain, make(), data, tmp_path, (8, 1)).model), end) < 1e-9
    assert distance(flatten(train(Plain, make(), data, tmp_path, (2, 4)).model), end) > 1e-2


@pytest.mark.fast(1)
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("task", ["sequence", "causal"])
def test_label_smoothing_and_clipping_stay(tmp_path, task, cut):
    make, labels = TASKS[task]
    data = Sentences(16, labels)
    _, end = by_hand(make(), data, clip=0.5, smoothing=0.1)
    how = {"max_grad_norm": 0.5, "label_smoothing_factor": 0.1}
    trainer = train(Exact, make(), data, tmp_path, cut, **how)
    assert distance(flatten(trainer.model), end) < 1e-6  # torch's clip adds 1e-6 to the norm


def test_schedules_logs_and_evaluation_stay(tmp_path):
    make, labels = TASKS["sequence"]
    data = Sentences(16, labels)
    how = {"lr_scheduler_type": "linear", "logging_strategy": "steps", "logging_steps": 1}
    trainer = train(Exact, make(), data, tmp_path, (2, 4), **how)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["learning_rate"] for row in logs] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert logs[-1]["loss"] == pytest.approx(float(trainer.gradient.loss), abs=1e-4)
    assert trainer.evaluate(data)["eval_loss"] > 0


def test_a_stopped_training_resumes_to_the_same_weights(tmp_path):
    data = Sentences(16, "class")

    def make():
        return bert("SequenceClassification", dropout=0.3, num_labels=3)

    how = {"save_strategy": "steps", "save_steps": 2}
    whole = train(Exact, make(), data, tmp_path / "whole", (2, 4), num_train_epochs=3, **how)
    trainer = Exact(
        model=make(),
        args=arguments(tmp_path / "again", 2, 4, num_train_epochs=3, **how),
        train_dataset=data,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(flatten(trainer.model), flatten(whole.model))


def test_each_device_batch_draws_as_one_grain(tmp_path):
    data = Sentences(8, "class")

    def make():
        return bert("SequenceClassification", dropout=0.3, num_labels=3)

    trainer = train(Exact, make(), data, tmp_path, (4, 2), num_train_epochs=1)
    model = make()
    pieces = [collate([data[i] for i in part]) for part in (range(4), range(4, 8))]
    objective = ab.Objective(example_losses(model))
    ab.batch_gradient(model, objective, ab.MicroBatches(pieces), key=ab.Key(42, 0))
    assert torch.equal(trainer.first, flatten(model, gradient=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path):
    make, labels = TASKS["causal"]
    data = Sentences(16, labels)
    _, end = by_hand(make(), data)
    trainer = train(Exact, make(), data, tmp_path, (2, 4), gradient_checkpointing=True)
    assert distance(flatten(trainer.model), end) < 1e-11


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_trains_its_adapters_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="the test extra has it")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])

    def make():
        torch.manual_seed(3)
        return peft.get_peft_model(bert("SequenceClassification", num_labels=3), config).double()

    data = Sentences(16, "class")
    models = [train(Exact, make(), data, tmp_path, cut).model for cut in ((8, 1), (2, 4))]
    assert distance(*map(flatten, models)) < 1e-11
    assert distance(flatten(models[0]), flatten(make())) > 1e-3


@pytest.mark.slow
def test_bfloat16_is_the_updates_own(tmp_path):
    data = Sentences(16, "class")

    def make():
        return bert("SequenceClassification", num_labels=3).float()

    ends = [
        flatten(train(Exact, make(), data, tmp_path, cut, bf16=True).model)
        for cut in ((8, 1), (2, 4))
    ]
    assert distance(*ends) < 1e-2
    wide = flatten(train(Exact, make(), data, tmp_path, (8, 1)).model)
    assert 1e-6 < distance(ends[0], wide) < 0.05  # it does make a difference


def test_the_ledger_has_each_examples_norm(tmp_path):
    make, labels = TASKS["sequence"]
    data = Sentences(8, labels)
    how = {"num_train_epochs": 1, "observe": ab.Observe(norms=True)}
    trainer = train(Exact, make(), data, tmp_path, (2, 4), **how)
    norms = []
    for i in range(8):
        model = make()
        compute_whole_loss(model, collate([data[i]])).backward()
        norms.append(flatten(model, gradient=True).norm())
    assert torch.allclose(trainer.gradient.ledger.norms, torch.stack(norms), rtol=1e-9)


@pytest.mark.fast(1)
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("task", ["sequence", "causal"])
def test_the_callback_sees_an_unchanged_trainer(tmp_path, task, cut):
    make, labels = TASKS[task]
    data = Sentences(8, labels)
    callback = LedgerCallback()
    how = {"num_train_epochs": 1, "learning_rate": 0.01}
    trainer = train(Plain, make(), data, tmp_path, cut, callbacks=[callback], **how)
    unseen = train(Plain, make(), data, tmp_path, cut, **how)
    assert distance(flatten(trainer.model), flatten(unseen.model)) < 1e-13
    weights = torch.ones(8, dtype=torch.float64)
    if task == "causal":  # this version divides by all labels, those that nothing predicts included
        lengths = torch.tensor([len(data.rows[i]) for i in range(8)]).double()
        weights = (lengths - 1) / lengths.sum()
    elif cut == (8, 1):
        weights /= 8
    else:
        weights /= 2  # issue 47688 of transformers: the mean of each micro-batch, added up
    for i in range(8):
        model = make()
        compute_whole_loss(model, collate([data[i]])).backward()
        expected = weights[i] * flatten(model, gradient=True).norm()
        assert callback.norms[i] == pytest.approx(float(expected), rel=1e-6)


MODELS = {
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        {"labels": torch.linspace(-1, 1, 6).double()},
    ),
    "several targets": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="regression"),
        {"labels": torch.linspace(-1, 1, 18).reshape(6, 3).double()},
    ),
    "several labels": (
        lambda: bert("SequenceClassification", num_labels=3),
        {"labels": (torch.arange(18).reshape(6, 3) % 2).double()},
    ),
    "answers": (
        lambda: bert("QuestionAnswering"),
        {"start_positions": torch.arange(6) % 5, "end_positions": torch.arange(6) % 4},
    ),
}


@pytest.mark.parametrize(("make", "labels"), MODELS.values(), ids=MODELS)
def test_the_mean_of_the_example_losses_is_the_models_own(make, labels):
    model = make().eval()
    ids = torch.randint(2, 40, (6, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, **labels}
    with torch.no_grad():
        losses = example_losses(model)(model, batch).values
        whole = float(model(**batch).loss)
        alone = [float(model(**{n: v[i : i + 1] for n, v in batch.items()}).loss) for i in range(6)]
    assert losses.shape == (6,)
    assert float(losses.mean()) == pytest.approx(whole, rel=1e-6)
    assert losses.tolist() == pytest.approx(alone, rel=1e-6)


def test_a_choice_of_several_is_one_example():
    model = bert("MultipleChoice").eval()
    ids = torch.randint(2, 40, (6, 3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": torch.arange(6) % 3}
    with torch.no_grad():
        losses = example_losses(model)(model, batch).values
        assert float(losses.mean()) == pytest.approx(float(model(**batch).loss), rel=1e-6)


def test_a_model_of_another_kind_is_refused():
    model = transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=12))
    with pytest.raises(ModelError, match="BertModel is none of the kinds whose losses are known"):
        example_losses(model)


class Focal(InOrder, ExactGradient, transformers.Trainer):
    """A trainer with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = ((1 - (-losses).exp()) ** 2 * losses).mean()
        return (loss, logits) if return_outputs else loss


def focal(model, batch):
    labels = batch.pop("labels")
    losses = F.cross_entropy(model(**batch).logits, labels, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


@pytest.mark.slow
def test_a_trainer_with_another_loss_is_refused_until_it_is_stated(tmp_path):
    make, labels = TASKS["sequence"]
    data = Sentences(16, labels)
    with pytest.raises(ModelError, match="this trainer minimises another loss"):
        train(Focal, make(), data, tmp_path, (2, 4))
    ends = [
        flatten(train(Focal, make(), data, tmp_path, cut, objective=ab.Objective(focal)).model)
        for cut in ((8, 1), (2, 4))
    ]
    assert distance(*ends) < 1e-11


def test_a_training_step_that_passes_the_mix_in_over_is_refused(tmp_path):
    class Wrong(InOrder, ExactTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return transformers.Trainer.training_step(self, model, inputs, num_items_in_batch)

    make, labels = TASKS["sequence"]
    with pytest.raises(ModelError, match=r"Wrong\.training_step takes the place of"):
        train(Wrong, make(), Sentences(16, labels), tmp_path, (2, 4))
