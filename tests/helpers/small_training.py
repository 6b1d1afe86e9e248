"""A small training in which everything that a checkpoint holds changes the result.

Dropout and batch normalisation in grains, momentum, rates of their own, a schedule, a penalty,
GroupDRO's state, an augmentation, an average of the user's, and a short last batch.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.runs.records import read_records

N, BATCH, EPOCHS = 21, 8, 3


class Average:
    """A moving average of the weights, kept by the body of the loop."""

    def __init__(self, model):
        self.weights = [p.detach().clone() for p in model.parameters()]
        self.updates = 0

    def update(self, model):
        self.updates += 1
        for average, p in zip(self.weights, model.parameters(), strict=True):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)

    def state_dict(self):
        return {"weights": self.weights, "updates": self.updates}

    def load_state_dict(self, state):
        self.weights, self.updates = list(state["weights"]), state["updates"]


def example_losses(model, batch):
    inputs, targets, groups = batch
    outputs = model(inputs)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    hits = (outputs.argmax(1) == targets).float()
    return ab.ExampleLosses(losses, groups=groups, metrics={"accuracy": hits})


def noisy(example, key):
    """An augmentation."""
    inputs, *rest = example
    return (inputs + 0.1 * torch.randn(inputs.shape, generator=key.generator()), *rest)


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1), torch.arange(N) % 2


OBJECTIVE = ab.Objective(example_losses, reduction=ab.GroupDRO(0.5), penalty=ab.L2(1e-2), grain=4)
SCHEDULE = ab.WarmUp(ab.StepDecay(0.1, 0.5, every=16), examples=10)


@dataclass
class Training:
    """One script's objects, made anew at each start of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    reduction: dict = field(default_factory=dict)
    losses: list = field(default_factory=list)

    @property
    def state(self):
        """All that training has made, copied."""
        state = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "reduction": self.reduction,
        }
        return copy.deepcopy(state)

    def loop(self, run=None, *, last="keep", epochs=EPOCHS, seed=7, **options):
        """`ab.steps` of this training, with the body's part in `average`."""
        options = {"transform": noisy, "schedule": SCHEDULE, "clip": ab.ClipNorm(1.0)} | options
        for step in ab.steps(
            self.model,
            options.pop("objective", OBJECTIVE),
            self.optimizer,
            options.pop("data", None) or data(),
            order=ab.Order(N, batch_size=BATCH, seed=seed, last=last),
            epochs=epochs,
            state={"average": self.average},
            run=run,
            **options,
        ):
            self.reduction = dict(step.gradient.reduction_state)
            self.losses.append(step.loss)
            self.average.update(self.model)
            yield step


def start():
    """Build what a script makes before its loop: the same at each start."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    weights = [p for name, p in model.named_parameters() if "bias" not in name]
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    optimizer = torch.optim.SGD(
        [{"params": weights}, {"params": biases, "lr": 0.2}], lr=0.1, momentum=0.9
    )
    return Training(model, optimizer, Average(model))


def train_small(run=None, body=lambda training, step: None, **options):
    """A training taken to its end; the body of its loop may do more."""
    training = start()
    for step in training.loop(run, **options):
        body(training, step)
    return training


def rows(folder, *kinds):
    """Rows of these kinds (all but sessions by default) without what time alone decides."""
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_records(folder / "records.jsonl")
        if (row["kind"] in kinds if kinds else row["kind"] != "session")
    ]


def noting(run, stop=None):
    """Train with a note of the user's a step; leave after `stop` updates without saving."""
    for step in start().loop(run):
        run.record({"kind": "note", "step": step.step, "halved": step.loss / 2})
        if step.step + 1 == stop:
            break
