"""micro_batch="auto": as much as fits, the same gradient, and nothing left behind by what did not.

Oracles: known tensors and the resident memory of a process for the count of bytes; plain
autograd on the unsplit batch for gradients (1e-12, sums in another order in float64).
"""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.gradient.auto_micro_batch import PeakBytes
from cases import SEED, STEP, Problem, Values, distance, flat_gradient, oracle

KEY = ab.Key(SEED, STEP)
MEGABYTE = 2**20


def test_bytes_are_counted_by_storage_and_given_back():
    rest = torch.zeros(1000)
    with PeakBytes() as memory:
        a = torch.empty(1000)  # 4,000 bytes
        b = a + 1
        views = b.view(10, 100)[5:], rest[10:], rest.add_(1)  # nothing new
        assert (memory.now, memory.peak) == (8000, 8000)
        del a
        assert memory.now == 4000
        del b, views
        assert (memory.now, memory.peak) == (0, 8000)


def test_a_backward_pass_is_counted_too():
    weight, x = nn.Parameter(torch.ones(100, 50)), torch.ones(8, 50)
    with PeakBytes() as memory:
        (x @ weight.t()).sum().backward()
    # The gradient, the sum, and 1 for its derivative stay; the product of 3,200 bytes is gone.
    assert memory.now == 4 * 100 * 50
    assert 4 * 100 * 50 <= memory.peak <= 4 * 100 * 50 + 3200 + 8


RESIDENT = """
import torch
from torch import nn
from anybatch.gradient.auto_micro_batch import PeakBytes

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

torch.set_num_threads(1)
model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(500, 500), nn.Tanh())])
x = torch.randn(12_000, 500)
model(x[:8]).sum().backward()
before = status("VmRSS")
model(x).square().sum().backward()
resident = status("VmHWM") - before
with PeakBytes() as memory:
    model(x).square().sum().backward()
print(resident, memory.peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_count_is_what_a_process_comes_to_hold():
    # Blocks of their own for large tensors: otherwise the allocator keeps holes of its own.
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT],
        env={"MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=True,
    )
    resident, counted = map(int, run.stdout.split())
    assert counted > 100 * MEGABYTE
    assert resident == pytest.approx(counted, rel=0.1)  # 10 %: matrix kernels have workspaces


def wide(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(128, 1), nn.Flatten(0)).to(dtype)


def squares(model, x):
    return model(x).square()


def inputs(size, dtype=torch.float64):
    return torch.randn(size, 128, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [2, 4, 8])
def test_a_memory_limit_is_kept_and_used(limit, dtype):
    x, objective = inputs(8192, dtype), ab.Objective(squares)
    layout = ab.Layout("auto", memory_bytes=limit * MEGABYTE)
    result = ab.batch_gradient(wide(dtype), objective, x, layout=layout)
    assert 1 < result.micro_batch < 8192
    model = wide(dtype)
    with PeakBytes() as memory:
        ab.batch_gradient(model, objective, x, layout=ab.Layout(result.micro_batch))
    # 5 % above for the losses of the whole batch, which stay; 40 % below where parts of equal
    # size are well under what fits.
    assert 0.6 * limit * MEGABYTE < memory.peak < 1.05 * limit * MEGABYTE


def test_a_memory_limit_changes_the_micro_batch_and_not_the_gradient():
    x, whole, cut = inputs(4096), wide(), wide()
    objective = ab.Objective(squares)
    all_at_once = ab.batch_gradient(whole, objective, x, layout=ab.Layout("auto"))
    layout = ab.Layout("auto", memory_bytes=2 * MEGABYTE)
    in_parts = ab.batch_gradient(cut, objective, x, layout=layout)
    assert all_at_once.micro_batch == 4096
    assert in_parts.micro_batch < 1024
    truth = oracle(
        Problem(wide(), (x,), lambda m, batch: Values(squares(m, *batch))),
        lambda m, results: results.values.mean(),
    )
    for model in (whole, cut):
        assert distance(flat_gradient(model), truth.gradient) < 1e-12


class Small(nn.Module):
    """Fits `fits` examples; for more it fails after it has counted, drawn, and averaged."""

    def __init__(self, fits, drop=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.fits, self.drop, self.tried = fits, drop, []
        self.layer = nn.Linear(3, 4).double()
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.average.mul_(0.9).add_(0.1 * x.mean(0))
        self.count += 1
        self.tried.append(len(x))
        if len(x) > self.fits:
            torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return F.dropout(self.layer(x), self.drop).square().sum(1)


def states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def examples(size=12):
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def update(model, x, grain=None, layout=ab.Layout("auto")):  # noqa: B008
    objective = ab.Objective(lambda model, x: model(x), grain=grain)
    return ab.batch_gradient(model, objective, x, key=KEY, layout=layout)


@pytest.mark.parametrize(("drop", "grain"), [(0.0, None), (0.5, 3)], ids=["quiet", "draws"])
def test_halving_until_it_fits_leaves_no_trace_but_the_gradient(drop, grain):
    model, roomy, x = Small(4, drop), Small(12, drop), examples()
    before = states()
    result = update(model, x, grain)
    assert states() == before
    assert {12, 6, 3} <= set(model.tried)
    truth = oracle(
        Problem(roomy, (x,), lambda m, batch: Values(m(*batch)), grain),
        lambda m, results: results.values.mean(),
    )
    assert distance(flat_gradient(model), truth.gradient) < 1e-12
    assert model.count == 1
    # Tolerance: some units of rounding of numbers near 1.
    assert (model.average - 0.1 * x.mean(0)).abs().max() < 1e-15
    assert result.micro_batch == 3


def test_not_even_one_example_fits():
    model = Small(0)
    before = states()
    with pytest.raises(ab.errors.LayoutError, match="A single example does not fit in memory"):
        update(model, examples(2))
    assert states() == before
    assert model.count == 0
    assert model.average.tolist() == [0, 0, 0]
    assert model.layer.weight.grad is None


def test_a_grain_that_does_not_fit_is_told_from_an_example_that_does_not():
    message = r"draws random numbers, so the model runs in grains.*Objective\(grain=\.\.\.\)"
    drawing = Small(4, drop=0.5)
    with pytest.raises(ab.errors.LayoutError, match=message):
        update(drawing, examples(), grain=6)
    assert drawing.tried[-2:] == [3, 6]  # 3 fit, and draw: a grain of 6 is tried once
    model = nn.Sequential(nn.BatchNorm1d(3).double(), Small(4))
    with pytest.raises(ab.errors.LayoutError, match=r"couples examples, so the model runs"):
        update(model, examples(), grain=6)


def test_an_error_while_memory_is_measured_leaves_nothing_behind():
    model, x = Small(12), examples()

    def losses(model, x):
        model(x)
        raise RuntimeError("a mistake in the loss")

    before = states()
    with pytest.raises(RuntimeError, match="a mistake in the loss"):
        ab.batch_gradient(model, ab.Objective(losses), x, layout=ab.Layout("auto"))
    assert states() == before
    assert model.count == 0
    assert model.layer.weight.grad is None


def test_what_fits_is_known_at_the_next_step_and_a_short_batch_does_not_forget_it():
    model, layout = Small(6), ab.Layout("auto")
    for size, expected in ((12, 6), (3, 6), (12, 6), (24, 6)):
        result = update(model, examples(size), layout=layout)
        assert result.micro_batch == expected
        layout = replace(layout, at_most=result.micro_batch)
    model.tried.clear()
    update(model, examples(12), layout=layout)
    assert model.tried == [6, 6]
    model.fits = 4  # less than was known: found out anew
    assert update(model, examples(12), layout=layout).micro_batch == 3
