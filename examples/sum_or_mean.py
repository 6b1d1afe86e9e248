"""Compare sum and mean: what must change with the reduction, and the effect of the batch size.

    Sum = B Mean,  so are the gradients:  lr_sum = lr / B,  and a penalty a becomes B a

1. Train with Mean; with Sum at lr/B and the penalty times B; with Sum at lr/B and the same penalty.
2. Double the batch by repeating it, and compare the norms of the gradient under Mean and Sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab

BATCH, STEPS, LR, PENALTY = 100, 50, 0.5, 0.01

torch.manual_seed(0)
inputs = torch.randn(BATCH, 20, dtype=torch.float64)
batch = inputs, inputs[:, :5].argmax(1)


def example_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of each example, without averaging."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def build_classifier() -> nn.Module:
    """Build the same linear classifier each time."""
    torch.manual_seed(1)
    return nn.Linear(20, 5, dtype=torch.float64)


def train(reduction: ab.Mean | ab.Sum, lr: float, penalty: float) -> Tensor:
    """Train on the batch, and return the weights."""
    model = build_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    objective = ab.Objective(example_losses, reduction=reduction, penalty=ab.L2(penalty))
    for _ in range(STEPS):
        ab.batch_gradient(model, objective, batch)
        optimizer.step()
    return model.weight.detach()


def gradient_norm(reduction: ab.Mean | ab.Sum, times: int) -> float:
    """Return the norm of the gradient, with the batch repeated."""
    model = build_classifier()
    repeated = tuple(torch.cat([tensor] * times) for tensor in batch)
    ab.batch_gradient(model, ab.Objective(example_losses, reduction=reduction), repeated)
    return float(model.weight.grad.norm())


mean = train(ab.Mean(), LR, PENALTY)
print(f"after {STEPS} updates, distance of the weights from those of Mean at lr = {LR}")
for name, penalty in (("penalty times B", PENALTY * BATCH), ("the same penalty", PENALTY)):
    weights = train(ab.Sum(), LR / BATCH, penalty)
    print(f"  Sum at lr/B, {name:<17} {float((weights - mean).norm() / mean.norm()):.1e}")
print("norm of the gradient, the batch doubled, over that of the batch")
for reduction in (ab.Mean(), ab.Sum()):
    ratio = gradient_norm(reduction, 2) / gradient_norm(reduction, 1)
    print(f"  {type(reduction).__name__:<4} {ratio:.3f}")
