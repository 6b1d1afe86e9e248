"""Metrics of torchmetrics in `evaluate`, and with the outputs of updates.

Oracle: the formula of each metric in NumPy, on the predictions for the whole data set. The figures
of torchmetrics are float32, so they agree to 1e-6. The control is the mean of batches' figures.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import LossError

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is missing")
from torchmetrics import classification, regression  # noqa: E402

N = 37
X = torch.linspace(-2, 2, 5 * N).reshape(N, 5).double().sin()
CLASSES = torch.arange(N) % 3
LABELS = (torch.arange(N) % 5 < 2).long()
COUNTS = torch.arange(N) % 4  # of which some are 0


def network(width):
    torch.manual_seed(0)
    return nn.Linear(5, width).double()


def classify(model, batch):
    logits = model(batch[0])
    values = F.cross_entropy(logits, batch[1], reduction="none")
    return ab.ExampleLosses(values, outputs={"predictions": logits, "targets": batch[1]})


def score(model, batch):
    logits, counts = model(batch[0])[:, 0], batch[2]
    values = F.binary_cross_entropy_with_logits(logits, batch[1].double(), reduction="none")
    outputs = {"predictions": logits, "targets": batch[1]}
    return ab.ExampleLosses(values * counts, counts=counts, outputs=outputs)


def regress(model, batch):
    predictions = model(batch[0])[:, 0]
    outputs = {"predictions": predictions, "targets": batch[1]}
    return ab.ExampleLosses((predictions - batch[1]) ** 2, outputs=outputs)


def accuracy(predictions, targets):
    return (predictions.argmax(1) == targets).mean()


def macro_f1(predictions, targets):
    choice, figures = predictions.argmax(1), []
    for c in range(3):
        hits = ((choice == c) & (targets == c)).sum()
        figures.append(2 * hits / ((choice == c).sum() + (targets == c).sum()))
    return np.mean(figures)


def area(predictions, targets):
    """Count the pairs of a positive and a negative example in the right order."""
    return (predictions[targets == 1][:, None] > predictions[targets == 0]).mean()


def r_squared(predictions, targets):
    return 1 - ((predictions - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()


PRESENT, POINTS = COUNTS > 0, (X, CLASSES)
CASES = {
    "accuracy": (
        lambda: classification.MulticlassAccuracy(3, average="micro"),
        (classify, 3, POINTS, ...),
        accuracy,
    ),
    "macro F1": (lambda: classification.MulticlassF1Score(3), (classify, 3, POINTS, ...), macro_f1),
    "area": (classification.BinaryAUROC, (score, 1, (X, LABELS, COUNTS), PRESENT), area),
    "R squared": (regression.R2Score, (regress, 1, (X, X.sum(1).exp()), ...), r_squared),
}  # fmt: skip


def predict(name):
    """Return predictions and targets of all examples that take part, as arrays."""
    _, (_, width, data, rows), _ = CASES[name]
    with torch.no_grad():
        predictions = network(width)(data[0])
    predictions = predictions if width > 1 else predictions[:, 0]
    return predictions[rows].numpy(), data[1][rows].numpy()


@pytest.mark.parametrize("micro_batch", [1, 6, 36, 37])
@pytest.mark.parametrize("name", CASES)
def test_a_metric_is_that_of_the_whole_data_set(name, micro_batch):
    make, (losses, width, data, _), formula = CASES[name]
    how = {"metrics": {name: make()}, "micro_batch": micro_batch}
    result = ab.evaluate(network(width), ab.Objective(losses), data, **how)
    assert result.metrics[name] == pytest.approx(formula(*predict(name)), rel=1e-6)
    without = ab.evaluate(network(width), ab.Objective(losses), data, micro_batch=micro_batch)
    assert (result.loss, result.parts) == (without.loss, without.parts)
    assert without.metrics == {}


@pytest.mark.parametrize("name", ["macro F1", "area", "R squared"])
def test_the_mean_of_batches_figures_is_another(name):  # the control; of accuracy at a ragged end
    formula = CASES[name][2]
    predictions, targets = predict(name)
    cuts = range(9, len(targets), 9)
    pieces = zip(np.split(predictions, cuts), np.split(targets, cuts), strict=True)
    figures = [formula(*piece) for piece in pieces if len(np.unique(piece[1])) > 1]
    assert abs(np.mean(figures) - formula(predictions, targets)) > 1e-3


def test_examples_with_a_count_of_0_take_no_part():
    predictions = network(1)(X)[:, 0].detach().numpy()
    assert abs(area(predictions, LABELS.numpy()) - area(*predict("area"))) > 1e-3  # the control
    none = (X, LABELS, torch.where(torch.arange(N) < 6, 0, COUNTS))  # the first micro-batch
    how = {"metrics": {"area": classification.BinaryAUROC()}, "micro_batch": 6}
    result = ab.evaluate(network(1), ab.Objective(score), none, **how)
    rows = (none[2] > 0).numpy()
    expected = area(predictions[rows], LABELS.numpy()[rows])
    assert result.metrics["area"] == pytest.approx(expected, rel=1e-6)


def test_a_model_that_writes_all_its_outputs_into_one_tensor():
    room = torch.empty(6, 3).double()

    def losses(model, batch):
        logits = room[: len(batch[0])].copy_(model(batch[0]).detach())
        values = F.cross_entropy(logits, batch[1], reduction="none")
        return ab.ExampleLosses(values, outputs={"predictions": logits, "targets": batch[1]})

    how = {"metrics": {"F1": classification.MulticlassF1Score(3)}, "micro_batch": 6}
    result = ab.evaluate(network(3), ab.Objective(losses), POINTS, **how)
    assert result.metrics["F1"] == pytest.approx(macro_f1(*predict("macro F1")), rel=1e-6)


def test_a_metric_keeps_its_own_state_and_what_it_has_seen_does_not_count():
    metric = classification.MulticlassAccuracy(3, average="micro")
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    how = {"metrics": {"accuracy": metric}}
    result = ab.evaluate(network(3), ab.Objective(classify), (X, CLASSES), **how)
    assert result.metrics["accuracy"] == pytest.approx(accuracy(*predict("accuracy")), rel=1e-6)
    assert float(metric.compute()) == 1.0 != result.metrics["accuracy"]


def test_a_collection_and_metrics_of_other_kinds():
    class Share:
        """A metric of one's own: the share of a class among the targets."""

        def reset(self):
            self.targets = []

        def update(self, predictions, targets):
            self.targets += targets.tolist()

        def compute(self):
            return np.float32(np.mean(np.array(self.targets) == 0))

    data, objective = (X, CLASSES), ab.Objective(classify)
    collection = torchmetrics.MetricCollection(
        {"F1": classification.MulticlassF1Score(3), "micro": CASES["accuracy"][0]()}, prefix="val_"
    )
    result = ab.evaluate(network(3), objective, data, metrics=collection).metrics
    expected = {
        "val_F1": macro_f1(*predict("macro F1")),
        "val_micro": accuracy(*predict("accuracy")),
    }
    assert result == pytest.approx(expected, rel=1e-6)
    result = ab.evaluate(network(3), objective, data, metrics={"share": Share()}).metrics
    assert result == {"share": pytest.approx(13 / 37)}


def test_sequences_of_several_lengths():
    tokens = [torch.arange(n) % 3 for n in (3, 1, 4, 2, 5)]
    model = nn.Embedding(4, 3, padding_idx=3).double()

    def losses(model, batch):
        logits = model(batch.masked_fill(batch < 0, 3))
        values = F.cross_entropy(logits.mT, batch, reduction="none", ignore_index=-100)
        outputs = {"predictions": logits.mT, "targets": batch}
        return ab.ExampleLosses(values.sum(1), counts=(batch >= 0).sum(1), outputs=outputs)

    def collate(examples):
        return nn.utils.rnn.pad_sequence(examples, batch_first=True, padding_value=-100)

    metric = classification.MulticlassAccuracy(3, average="micro", ignore_index=-100)
    union = torch.cat(tokens)
    expected = (model(union).argmax(1) == union).double().mean()
    for micro_batch in (2, 3, 5):
        how = {"collate": collate, "micro_batch": micro_batch, "metrics": {"accuracy": metric}}
        result = ab.evaluate(model, ab.Objective(losses), tokens, **how)
        assert result.metrics["accuracy"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("sizes", [None, 1, 6, (30, 7)])
def test_outputs_of_an_update_are_those_of_the_whole_batch(sizes):
    layout = ab.Layout(micro_batch=sizes)
    gradient = ab.batch_gradient(
        network(3), ab.Objective(classify), (X, CLASSES), key=ab.Key(0, 0), layout=layout
    )
    metric = classification.MulticlassF1Score(3)
    metric.update(gradient.outputs["predictions"], gradient.outputs["targets"])
    assert float(metric.compute()) == pytest.approx(macro_f1(*predict("macro F1")), rel=1e-6)


def bare(model, batch):
    return classify(model, batch).values


def two(model, batch):
    return {"a": classify(model, batch), "b": classify(model, batch)}


def name_metrics(model, batch):
    losses = classify(model, batch)
    return ab.ExampleLosses(losses.values, metrics={"m": losses.values}, outputs=losses.outputs)


WRONG = {
    "no outputs": (bare, CASES["accuracy"][0], r"0 terms .*the outputs are: none\. Return"),
    "two terms": (two, CASES["accuracy"][0], r"2 terms .*'a\.predictions'"),
    "a name twice": (name_metrics, CASES["accuracy"][0], "have a metric 'm' already"),
    "another kind": (
        classify,
        lambda: classification.MulticlassAccuracy(7),
        r"'m' cannot be computed: .* predictions \(37, 3\) of torch\.float64 and targets \(37,\)",
    ),
    "several numbers": (
        classify,
        lambda: classification.MulticlassAccuracy(3, average="none"),
        r"computes a Tensor of shape \(3,\).*average='macro'",
    ),
    "a function": (classify, lambda: accuracy, "'m' cannot be computed: .* no attribute 'reset'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_metric_that_does_not_fit_is_refused(kind):
    losses, make, message = WRONG[kind]
    reduction = {"a": ab.Mean(), "b": ab.Mean()} if losses is two else ab.Mean()
    with pytest.raises(LossError, match=message):
        ab.evaluate(network(3), ab.Objective(losses, reduction), POINTS, metrics={"m": make()})


def test_a_metric_without_a_name_is_refused():
    with pytest.raises(
        LossError, match=r'metrics is MulticlassF1.* a dict, \{"accuracy": metric\}'
    ):
        ab.evaluate(
            network(3), ab.Objective(classify), (X, CLASSES), metrics=CASES["macro F1"][0]()
        )
