"""Several ways to the same figures: they agree, the fastest is taken, and a pin is obeyed.

Oracles: NumPy in float64, one example at a time; torch's own operation where bits must be equal.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import LedgerError
from anybatch.kernels import choice as kernels
from anybatch.kernels import operations as faster
from kernel_cases import forget, fresh, seeded

__all__ = ["fresh"]


class Ways:
    """Two ways to a number, that count how often they are taken; the default is the slower."""

    def __init__(self) -> None:
        self.taken = {"torch": 0, "onednn": 0}

    def run(self, size: int = 4) -> str:
        def way(name: str, seconds: float) -> Callable[[], str]:
            def run_way() -> str:
                self.taken[name] += 1
                time.sleep(seconds)
                return name

            return run_way

        ways = {"torch": way("torch", 4e-3), "onednn": way("onednn", 0.0)}
        return kernels.run_fastest("test", torch.zeros(1), (size,), ways)


def the_file(folder: Path) -> Path:
    """Return the only file in the cache."""
    (file,) = (folder / "anybatch").iterdir()
    return file


@pytest.mark.parametrize("way", ["torch", "onednn", "fastest"])
def test_torchs_kernels_compute_within_the_context_alone(way: str) -> None:
    kernels.use(way)
    with kernels.use_torch_kernels():
        assert kernels.get_way() == "torch"
    assert kernels.get_way() == way


@seeded
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 9), st.booleans(), st.integers(0, 2**20)
)
@pytest.mark.parametrize("way", ["torch", "onednn"])
def test_products_agree_with_numpy_for_every_layout_in_memory(
    way: str, n: int, d: int, p: int, has_bias: bool, seed: int
) -> None:
    kernels.use(way)
    make = torch.Generator().manual_seed(seed)
    rows, matrix = (torch.randn(size, 2 * d, generator=make) for size in (n, p))
    bias = torch.randn(p, generator=make) if has_bias else None
    for x in (rows[:, :d].contiguous(), rows[:, ::2], rows[:, :d].T.contiguous().T):
        for w in (matrix[:, :d].contiguous(), matrix[:, d:], matrix[:, :d].T.contiguous().T):
            expected = x.double().numpy() @ w.double().numpy().T
            expected += 0 if bias is None else bias.double().numpy()
            # Rounding grows with the terms, which may cancel in their sum.
            terms = np.linalg.norm(abs(x.numpy()) @ abs(w.numpy()).T)
            product = kernels.multiply(x, w, bias).numpy()
            assert np.linalg.norm(product - expected) < 1e-6 * terms
            if not has_bias:  # the control: one row too few
                expected[-1] = 0
                assert np.linalg.norm(product - expected) > 1e-5 * terms


def test_the_fastest_is_taken_and_measured_once_for_sizes_that_round_alike() -> None:
    ways = Ways()
    assert ways.run(5) == "onednn"
    measured = dict(ways.taken)
    assert measured["torch"] > 1
    assert ways.run(5) == ways.run(8) == "onednn"
    assert ways.taken == {**measured, "onednn": measured["onednn"] + 2}
    ways.run(9)  # the control: another size
    assert ways.taken["torch"] > measured["torch"]


def test_a_choice_that_is_not_offered_any_more_is_made_anew() -> None:
    assert Ways().run() == "onednn"
    assert kernels.run_fastest("test", torch.zeros(1), (4,), {"a": str, "b": str}) == ""


def test_a_way_in_use_is_obeyed_and_nothing_is_measured(tmp_path: Path) -> None:
    ways = Ways()
    kernels.use("torch")
    assert ways.run() == "torch"
    kernels.use("onednn")
    assert ways.run() == "onednn"
    assert ways.taken == {"torch": 1, "onednn": 1}
    assert list(tmp_path.iterdir()) == []
    other = kernels.run_fastest("test", torch.zeros(1), (4,), {"a": lambda: "a", "b": lambda: "b"})
    assert other == "a"  # what has no such way takes its default


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_environment_says_which_way_is_in_use_and_torch_is_the_default() -> None:
    code = "from anybatch.kernels import choice; print(choice.get_way())"
    assert in_a_new_process(code).stdout == "torch\n"
    assert in_a_new_process(code, ANYBATCH_KERNELS="fastest").stdout == "fastest\n"
    refused = in_a_new_process(code, ANYBATCH_KERNELS="fast").stderr
    assert "ANYBATCH_KERNELS is 'fast'. It must be one of torch, fastest, onednn." in refused


@pytest.mark.slow
def test_a_plain_update_measures_nothing_and_writes_no_file(tmp_path: Path) -> None:
    code = (
        "import anybatch as ab, torch;"
        "model, data = torch.nn.Linear(2000, 1000), torch.rand(600, 2000);"
        "objective = ab.Objective(lambda m, x: m(x).square().sum(1));"
        "ab.batch_gradient(model, objective, data, observe=ab.Observe())"
    )
    for way, files in (("torch", 0), ("fastest", 1)):  # the second is the control
        folder = tmp_path / way
        ended = in_a_new_process(code, ANYBATCH_KERNELS=way, XDG_CACHE_HOME=str(folder))
        assert ended.returncode == 0, ended.stderr
        assert len(list(folder.rglob("*.json"))) == files


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(LedgerError, match=r"kernels.use is 'mkl'. It must be one of torch, fast"):
        kernels.use("mkl")


def test_choices_outlast_the_process_and_belong_to_torch_and_processor(tmp_path: Path) -> None:
    assert Ways().run() == "onednn"
    file = the_file(tmp_path)
    assert file.name.startswith(f"kernels-{torch.__version__}-")
    forget()
    again = Ways()
    assert again.run() == "onednn"
    assert again.taken == {"torch": 0, "onednn": 1}
    file.rename(file.with_name(file.name.replace(torch.__version__, "1.0.0")))
    forget()
    other = Ways()
    other.run()
    assert other.taken["torch"] > 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "7", "\udcff", "[" * 10**5),
        '{"test, torch.float32, 4, 1 threads": 3}',
        '{"test, torch.float32, 4, 1 threads": "a way that is no more"}',
    ],
)
def test_a_damaged_file_is_done_without(text: str, tmp_path: Path) -> None:
    Ways().run()
    file = the_file(tmp_path)
    file.write_text(text, errors="surrogateescape")
    forget()
    ways = Ways()
    assert ways.run() == "onednn"
    assert ways.taken["torch"] > 1
    assert json.loads(file.read_text()) == {"test, torch.float32, 4, 1 threads": "onednn"}


def test_a_folder_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ways = Ways()
    assert ways.run() == "onednn"
    measured = ways.taken["torch"]
    assert ways.run() == "onednn"
    assert ways.taken["torch"] == measured  # this process knows all the same


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_the_default_way(dtype: torch.dtype) -> None:
    kernels.use("onednn")
    x, w, bias = (torch.randn(*s, dtype=dtype) for s in [(8, 40), (6, 40), (6,)])
    assert not kernels.has_alternative(x, w)
    assert torch.equal(kernels.multiply(x, w, bias), F.linear(x, w, bias))
    assert faster.linear(x, w, bias) is None


def test_without_onednn_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(8, 40), torch.randn(6, 40)
    assert kernels.has_alternative(x, w)  # the control
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    kernels.use("onednn")
    assert not kernels.has_alternative(x, w)
    assert torch.equal(kernels.multiply(x, w), F.linear(x, w))


def test_small_products_have_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 8 * 40 * 6 + 1)
    assert not kernels.has_alternative(torch.randn(8, 40), torch.randn(6, 40))
    assert kernels.has_alternative(torch.randn(9, 40), torch.randn(6, 40))


def test_measuring_draws_no_random_numbers_and_the_first_result_is_like_the_next() -> None:
    x, w = torch.randn(64, 300), torch.randn(50, 300)
    before = torch.get_rng_state()
    first = kernels.multiply(x, w)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, kernels.multiply(x, w))


def test_memory_for_large_results_is_like_any_other() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        memory = kernels.allocate((3, 4), torch.zeros(1, dtype=dtype))
        assert memory.shape == (3, 4)
        assert memory.dtype == dtype
        assert memory.fill_(2).sum() == 24
