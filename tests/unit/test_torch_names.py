"""Plain replacements of private operations of torch, for versions without them.

Oracle: torch's own operation on the same tensors, to the last bit.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anybatch import _torch

FACTOR = torch.tensor(0.25)


def make_tensors(seed: int, last: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, generator=generator), torch.tensor([2.0, last])]


OPERATIONS: dict[str, Callable[[Any, list[Tensor], Tensor], Any]] = {
    "multiply_in_place": lambda call, tensors, flag: call(tensors, FACTOR),
    "sum_in_place": lambda call, tensors, flag: call(tensors, make_tensors(1)),
    "copy_in_place": lambda call, tensors, flag: call(tensors, make_tensors(1)),
    "norms_of": lambda call, tensors, flag: tensors.extend(call(tensors)),
    "unscale_in_place": lambda call, tensors, flag: call(tensors, flag, FACTOR),
}


@pytest.mark.parametrize("last", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_replacement_does_what_torchs_operation_does(name: str, last: float) -> None:
    results = []
    for call in (getattr(_torch, f"_{name}"), getattr(_torch, name), lambda *arguments: ()):
        tensors, flag = make_tensors(0, last), torch.zeros(())
        OPERATIONS[name](call, tensors, flag)
        results.append([*tensors, flag])
    ours, theirs, unchanged = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert len(ours) != len(unchanged) or not torch.equal(ours[0], unchanged[0])  # the control
    assert (name == "unscale_in_place" and last != 1) == bool(theirs[-1])
