"""Tensors of an observed update are free when it ends, before Python collects cycles.

Control: the same search notices a tensor that a cycle of the test's own holds.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch as ab

B = 16


@contextmanager
def count_tensors_in_cycles() -> Iterator[Callable[[], int]]:
    """Stop the collection of cycles; then count those tensors in them that have B or B / 2 rows."""
    gc.collect()
    gc.disable()

    def count() -> int:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return sum(isinstance(x, Tensor) and x.shape[:1] in ((B,), (B // 2,)) for x in gc.garbage)

    try:
        yield count
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


class LastOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), (6,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(1)), (1, 3, 3)),
    "lstm": (LastOutput, (4, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["norms", "share", "gradients", "clipped", "cut"])
def test_no_cycle_holds_the_tensors_of_an_update(name: str, how: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, batch = make(), (torch.randn(B, *shape), torch.randint(3, (B,)))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    options = {
        "norms": {"observe": ab.Observe(norms=True)},
        "share": {"observe": ab.Observe(share=True)},
        "gradients": {"observe": ab.Observe(gradients=True)},
        "clipped": {"clip": ab.ClipExamples(0.1)},
        "cut": {"observe": ab.Observe(norms=True), "layout": ab.Layout(8)},
    }[how]
    ab.batch_gradient(model, ab.Objective(losses), batch, **options)  # finds the plan
    with count_tensors_in_cycles() as count:
        ab.batch_gradient(model, ab.Objective(losses), batch, **options)
        assert count() == 0


def test_a_tensor_in_a_cycle_is_counted() -> None:
    with count_tensors_in_cycles() as count:
        cycle: list[object] = [torch.zeros(B, 2)]
        cycle.append(cycle)
        del cycle
        assert count() == 1
