"""Parameters that no example reaches get zeros of their own type, on every rank.

Two processes over gloo; one of the two parts of the model is reached by no loss. The parameters are
bfloat16, whose sums are kept in float32: the zeros must come back as bfloat16.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import anybatch as ab


class HalfUsed(nn.Module):
    """Uses one of two layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Linear(3, 2, dtype=dtype)
        self.unused = nn.Linear(4, 5, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def losses(model, batch):
    return model(batch[0]).float().square().sum(1)


def describe_gradients(dtype, rank, group, cut):
    """Return shape, type and largest entry of each gradient of an update of 6 examples."""
    model = HalfUsed(dtype)
    share = (
        torch.arange(18.0, dtype=dtype).view(6, 3)[rank::2]
        if group
        else torch.arange(18.0, dtype=dtype).view(6, 3)
    )
    layout = ab.Layout(cut)
    ab.batch_gradient(model, ab.Objective(losses), (share,), layout=layout, group=group)
    return {
        name: (tuple(p.grad.shape), str(p.grad.dtype), p.grad.abs().max().item())
        for name, p in model.named_parameters()
    }


def run_rank(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = [
        describe_gradients(dtype, rank, dist.group.WORLD, cut)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for cut in (None, 1)
    ]
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def assert_zeros(results, dtype):
    for name in ("unused.weight", "unused.bias"):
        shape = (5, 4) if name.endswith("weight") else (5,)
        assert results[name] == (shape, str(dtype), 0.0)
    assert results["used.weight"][1] == str(dtype)
    assert results["used.weight"][2] > 0  # the control: what is reached is not zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cut", [None, 1, 4])
def test_zeros_have_the_type_of_the_parameter(dtype, cut):
    assert_zeros(describe_gradients(dtype, 0, None, cut), dtype)


def test_zeros_have_the_type_of_the_parameter_on_two_ranks(tmp_path: Path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / str(rank))
        assert len(results) == 6
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
        for dtype, pair in zip(dtypes, (results[:2], results[2:4], results[4:]), strict=True):
            for each in pair:
                assert_zeros(each, dtype)
