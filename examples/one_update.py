"""Make one update from two examples whose losses cancel.

    L_i = g_i . w,    G = (g_1 + g_2) / 2,    w <- w - 0.1 G

The mean loss is 0. The mean of the gradients is not 0, and only it moves the weights. A weight
whose mean gradient is 0 stays where it is.
"""

import torch
from torch import Tensor, nn

import anybatch as ab

g = torch.tensor([[1.5, -2.0, 1.1, 0.4, -0.9], [1.2, 2.3, -1.1, -0.8, -0.7]], dtype=torch.float64)
model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
with torch.no_grad():
    model.weight.copy_(torch.tensor([[0, 0, 0, 3.2, -0.8]], dtype=torch.float64))


def example_losses(model: nn.Module, examples: Tensor) -> Tensor:
    """Return g_i . w of each example."""
    return model(examples)[:, 0]


def format_row(values: Tensor) -> str:
    """Format five numbers in columns."""
    return "  ".join(f"{value + 0.0:7.3f}" for value in values.detach().flatten().tolist())


print(f"weights before     {format_row(model.weight)}")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
gradient = ab.batch_gradient(model, ab.Objective(example_losses, reduction=ab.Mean()), g)
for i, (loss, weight) in enumerate(
    zip(gradient.losses.values, gradient.coefficients, strict=True), 1
):
    print(f"example {i}: gradient {format_row(g[i - 1])}   loss {loss:+.0f}, counts {weight:.1f}")
print(f"their mean         {format_row(model.weight.grad)}   loss {gradient.loss:+.0f}")
optimizer.step()
print(f"weights after      {format_row(model.weight)}")
