"""Make one mini-batch update step by step, and all at once.

    for each example: forward, back;   sum;   divide by B;   w <- w - lr G

The loop is `anybatch.reference`, which does exactly this in NumPy. `ab.batch_gradient` does the
same for all examples at once. Watch the max-pooling layer: each example has its own winners, and
only the gradients of the weights are averaged.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch import reference

BATCH, LR = 32, 0.1

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
).double()
inputs = torch.rand(BATCH, 1, 8, 8, dtype=torch.float64)
targets = torch.arange(BATCH) % 10


def example_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


layers = [
    reference.Conv2d(1, 6, 3),
    reference.ReLU(),
    reference.MaxPool2d(2),
    reference.Flatten(),
    reference.Dense(54, 10),
]
network = reference.Network(
    layers, [{n: p.detach().numpy() for n, p in m.named_parameters()} for m in model]
)

start = time.perf_counter()
loop = reference.batch_gradient(
    network, reference.SoftmaxCrossEntropy(), list(inputs.numpy()), targets.tolist()
)
loop_seconds = time.perf_counter() - start
for i, example in enumerate(loop.examples[:4]):
    winners = example.stored[2]["winners"]
    print(f"example {i}: loss {example.loss:.4f}, winners of its first map {winners[0].tolist()}")
print(f"... summed over {BATCH} and divided: loss {loop.loss:.4f}")

objective = ab.Objective(example_losses)
ab.batch_gradient(model, objective, (inputs, targets))  # once to warm up
start = time.perf_counter()
gradient = ab.batch_gradient(model, objective, (inputs, targets))
batch_seconds = time.perf_counter() - start

at_once = torch.cat([p.grad.flatten() for p in model.parameters()])
step_by_step = torch.from_numpy(reference.flatten(loop.gradients))
distance = float((at_once - step_by_step).norm() / step_by_step.norm())
print(f"all at once: loss {gradient.loss:.4f}, gradient {distance:.0e} away")
print(f"seconds: loop {loop_seconds:.4f}, all at once {batch_seconds:.4f}")

torch.optim.SGD(model.parameters(), lr=LR).step()
after = ab.batch_gradient(model, objective, (inputs, targets)).loss
print(f"one update at lr = {LR}: loss {loop.loss:.4f} -> {after:.4f}")
