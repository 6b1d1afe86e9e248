"""The batch of the first question, worked: losses 2 and -2, of which the mean is 0.

v_i = g_i . w,   g_1 = (1.5, -2.0, 1.1, 0.4, -0.9),   g_2 = (1.2, 2.3, -1.1, -0.8, -0.7)
"""

from typing import Any

import torch
from torch import nn

from anybatch.gradient import batch_gradient
from anybatch.ledger import Observe
from anybatch.objective import Objective

__all__ = ["worked_batch"]

GRADIENTS = ((1.5, -2.0, 1.1, 0.4, -0.9), (1.2, 2.3, -1.1, -0.8, -0.7))
WEIGHTS = (0.0, 0.0, 0.0, 3.2, -0.8)
LR = 0.1


def worked_batch() -> dict[str, Any]:
    """One update by SGD, computed as it is asked for."""
    g = torch.tensor(GRADIENTS, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([WEIGHTS]))
    objective = Objective(lambda m, x: m(x)[:, 0])
    gradient = batch_gradient(model, objective, g, observe=Observe(share=True))
    before = model.weight.detach().flatten().tolist()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    assert gradient.ledger is not None
    assert gradient.ledger.norms is not None
    assert gradient.ledger.share is not None
    assert model.weight.grad is not None
    mean = model.weight.grad.flatten()
    return {
        "losses": gradient.losses.values.tolist(),
        "loss": float(gradient.loss),
        "gradients": g.tolist(),
        "norms": gradient.ledger.norms.tolist(),
        "share": gradient.ledger.share.tolist(),
        "mean": mean.tolist(),
        "sum": float(mean.norm()),
        "lengths": float(gradient.ledger.norms.mean()),  # sum_i |c_i g_i|
        "lr": LR,
        "before": before,
        "after": model.weight.detach().flatten().tolist(),
    }
