"""A small training, compiled or plain, whose numbers can be compared."""

import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

N, BATCH = 70, 16  # four batches and a short one
ORDER = ab.Order(N, batch_size=BATCH, seed=0)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 6, generator=generator, dtype=dtype)
    weights = torch.rand(N, generator=generator, dtype=dtype)
    weights[::9] = 0
    return inputs, inputs[:, :3].argmax(1), weights


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def losses(model, batch):
    outputs = model(batch[0])
    values = F.cross_entropy(outputs, batch[1], reduction="none")
    hits = (outputs.argmax(1) == batch[1]).to(values.dtype)
    return ab.ExampleLosses(values, metrics={"accuracy": hits}, outputs={"logits": outputs})


def weighted(model, batch):
    term = losses(model, batch)
    metrics = {"accuracy": batch[2] * term.metrics["accuracy"]}
    return ab.ExampleLosses(batch[2] * term.values, counts=batch[2], metrics=metrics)


def two_terms(model, batch):
    outputs = model(batch[0])
    return {"fit": weighted(model, batch), "size": outputs.square().sum(1)}


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.1)


def amsgrad(parameters):
    first, *others = parameters
    return torch.optim.Adam(
        [{"params": [first], "lr": 0.02}, {"params": others}], 0.1, amsgrad=True
    )


def begin(compile, model, optimizer, objective=None, examples=None, **options):
    """Begin a training of `ab.steps`."""
    objective = objective or ab.Objective(losses)
    examples = data() if examples is None else examples
    options = {"order": ORDER, "steps": 14} | options
    return ab.steps(model, objective, optimizer, examples, compile=compile, **options)


def train(compile, objective=None, optimizer=sgd, model=None, examples=None, **options):
    """Return all numbers of a training: of each step, weights and the optimiser's state."""
    model = network() if model is None else model
    optimizer, rows = optimizer(model.parameters()), []
    for step in begin(compile, model, optimizer, objective, examples, **options):
        gradient = step.gradient
        rows += [step.loss, step.lr, *step.parts.values(), *step.metrics.values()]
        rows += [] if gradient.norm is None else [gradient.norm.item()]
        rows += [g for p in model.parameters() for g in p.grad.flatten().tolist()]
        rows += [v for t in gradient.terms.values() for v in t.values.flatten().tolist()]
        rows += [v for c in gradient.term_coefficients.values() for v in c.tolist()]
        rows += [v for t in gradient.outputs.values() for v in t.flatten().tolist()]
    states = optimizer.state.values()
    state = [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
    tensors = [*(p.detach() for p in model.parameters()), *(t.double() for t in state)]
    return torch.cat([torch.tensor(rows, dtype=torch.float64), *(t.flatten() for t in tensors)])


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())
