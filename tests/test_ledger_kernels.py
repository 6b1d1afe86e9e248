"""Several ways to the same figures: they agree, the fastest is taken, and a pin is obeyed.

Oracles: NumPy in float64, one example at a time; torch's own operation where bits must be equal.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger import faster, kernels

seeded = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROUNDING = 1e-5  # of float32 sums of up to some hundred terms, norm over norm; about 100 eps


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing chosen, nothing pinned, a cache folder of one's own, and no product too small."""
    monkeypatch.delenv("ANYBATCH_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "SMALL", 1)
    monkeypatch.setattr(faster, "SMALL", 1)
    monkeypatch.setattr(faster, "_WORTH", 1)
    forget()
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    kernels.pin(None)
    kernels._kept.clear()
    kernels._chosen.clear()


def distance(found: Tensor, expected: np.ndarray[Any, Any]) -> float:
    """Norm of the difference over the norm."""
    expected = np.asarray(expected, np.float64)
    scale = max(float(np.linalg.norm(expected)), 1e-30)
    return float(np.linalg.norm(found.detach().double().numpy() - expected)) / scale


class Ways:
    """Two ways to a number, that count how often they are taken; the default is the slower."""

    def __init__(self) -> None:
        self.taken = {"torch": 0, "onednn": 0}

    def run(self, size: int = 4) -> str:
        def way(name: str, seconds: float) -> Callable[[], str]:
            def own() -> str:
                self.taken[name] += 1
                time.sleep(seconds)
                return name

            return own

        ways = {"torch": way("torch", 4e-3), "onednn": way("onednn", 0.0)}
        return kernels.fastest("test", torch.zeros(1), (size,), ways)


def the_file(folder: Path) -> Path:
    """The only one in the cache."""
    (file,) = (folder / "anybatch").iterdir()
    return file


@seeded
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 9), st.booleans(), st.integers(0, 2**20)
)
@pytest.mark.parametrize("way", ["torch", "onednn"])
def test_products_agree_with_numpy_for_every_layout_in_memory(
    way: str, n: int, d: int, p: int, has_bias: bool, seed: int
) -> None:
    kernels.pin(way)
    make = torch.Generator().manual_seed(seed)
    rows, matrix = (torch.randn(size, 2 * d, generator=make) for size in (n, p))
    bias = torch.randn(p, generator=make) if has_bias else None
    for x in (rows[:, :d].contiguous(), rows[:, ::2], rows[:, :d].T.contiguous().T):
        for w in (matrix[:, :d].contiguous(), matrix[:, d:], matrix[:, :d].T.contiguous().T):
            expected = x.double().numpy() @ w.double().numpy().T
            expected += 0 if bias is None else bias.double().numpy()
            assert distance(kernels.product(x, w, bias), expected) < ROUNDING
            if not has_bias:  # the control: one row too few
                expected[-1] = 0
                assert distance(kernels.product(x, w, bias), expected) > 100 * ROUNDING


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
    assert kernels.fastest("test", torch.zeros(1), (4,), {"a": str, "b": str}) == ""


def test_a_pin_is_obeyed_and_nothing_is_measured(tmp_path: Path) -> None:
    ways = Ways()
    kernels.pin("torch")
    assert ways.run() == "torch"
    kernels.pin("onednn")
    assert ways.run() == "onednn"
    assert ways.taken == {"torch": 1, "onednn": 1}
    assert list(tmp_path.iterdir()) == []
    other = kernels.fastest("test", torch.zeros(1), (4,), {"a": lambda: "a", "b": lambda: "b"})
    assert other == "a"  # what has no such way takes its default


def test_the_environment_pins_until_something_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYBATCH_KERNELS", "torch")
    ways = Ways()
    assert ways.run() == "torch"
    kernels.pin("onednn")
    assert ways.run() == "onednn"
    assert sum(ways.taken.values()) == 2


def test_an_unknown_pin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LedgerError, match=r"kernels.pin is 'mkl', expected one of torch, onednn"):
        kernels.pin("mkl")
    monkeypatch.setenv("ANYBATCH_KERNELS", "fast")
    with pytest.raises(LedgerError, match="ANYBATCH_KERNELS is 'fast', expected one of torch"):
        Ways().run()


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
    kernels.pin("onednn")
    x, w, bias = (torch.randn(*s, dtype=dtype) for s in [(8, 40), (6, 40), (6,)])
    assert not kernels.pays(x, w)
    assert torch.equal(kernels.product(x, w, bias), F.linear(x, w, bias))
    assert faster.linear(x, w, bias) is None


def test_without_onednn_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(8, 40), torch.randn(6, 40)
    assert kernels.pays(x, w)  # the control
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    kernels.pin("onednn")
    assert not kernels.pays(x, w)
    assert torch.equal(kernels.product(x, w), F.linear(x, w))


def test_small_products_have_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 8 * 40 * 6 + 1)
    assert not kernels.pays(torch.randn(8, 40), torch.randn(6, 40))
    assert kernels.pays(torch.randn(9, 40), torch.randn(6, 40))


def test_measuring_draws_no_random_numbers_and_the_first_result_is_like_the_next() -> None:
    x, w = torch.randn(64, 300), torch.randn(50, 300)
    before = torch.get_rng_state()
    first = kernels.product(x, w)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, kernels.product(x, w))


@pytest.mark.parametrize("way", ["torch", "onednn"])
@pytest.mark.parametrize("shape", [(7, 20), (3, 5, 20), (2, 3, 4, 20)])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_linear_layer_has_the_gradients_of_its_equation(
    way: str, shape: tuple[int, ...], is_frozen: bool
) -> None:
    kernels.pin(way)
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    w, b = torch.randn(6, 20), torch.randn(6)
    w.requires_grad_(not is_frozen), b.requires_grad_(not is_frozen)
    y = faster._Linear.apply(x, w, b)
    d = torch.randn(y.shape)
    y.relu_().backward(d)  # what follows may change it in place
    rows, weight = x.detach().reshape(-1, 20).double().numpy(), w.detach().double().numpy()
    pre = rows @ weight.T + b.detach().double().numpy()
    back = d.reshape(-1, 6).double().numpy() * (pre > 0)
    assert distance(y.reshape(-1, 6), pre * (pre > 0)) < ROUNDING
    assert x.grad is not None
    assert distance(x.grad.reshape(-1, 20), back @ weight) < ROUNDING
    assert distance(x.grad.reshape(-1, 20), d.reshape(-1, 6).numpy() @ weight) > 0.1  # control
    if is_frozen:
        assert w.grad is None
        assert b.grad is None
        return
    assert w.grad is not None
    assert b.grad is not None
    assert distance(w.grad, back.T @ rows) < ROUNDING
    assert distance(b.grad, back.sum(0)) < ROUNDING


@seeded
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(3, 7), st.integers(3, 7)),
    *(st.sampled_from(choices) for choices in [(1, 2, 3, (2, 3)), (None, 1, 2, (2, 1)), (0, 1)]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_max_pooling_is_torchs_bit_for_bit(
    shape: tuple[int, ...], kernel: Any, stride: Any, padding: int, ceil: bool, seed: int
) -> None:
    if kernel == 1:
        padding = 0
    make = torch.Generator().manual_seed(seed)
    x = torch.randint(4, shape, generator=make).float()  # many ties
    x[0, 0, 0, 0] = float("nan")
    how = {"stride": stride, "padding": padding, "ceil_mode": ceil}
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = F.max_pool2d(theirs, kernel, **how)
    for name in ("torch", "last"):
        kernels._chosen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_choice", lambda _, ways, name=name: name)
            found = faster.max_pool2d(mine, kernel, **how)
        if name == "torch":
            assert found is None
            continue
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        d = torch.randn(found.shape, generator=make)
        (g,) = torch.autograd.grad(found, mine, d)
        (g_expected,) = torch.autograd.grad(expected, theirs, d, retain_graph=True)
        assert torch.equal(g, g_expected)


def test_a_tie_goes_to_the_first_in_row_major_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_choice", lambda *_: "last")
    x = torch.ones(1, 2, 2, 2, requires_grad=True)
    found = faster.max_pool2d(x, 2)
    assert found is not None
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten(2).tolist() == [[[1, 0, 0, 0]] * 2]


class Model(nn.Module):
    """A convolution, pooling, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.conv(x).relu()).flatten(1)
        logits: Tensor = self.head(self.hidden(h).relu_())
        return logits


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a sum of squares."""
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", [None, "torch", "onednn"])
def test_a_model_under_the_mode_has_the_gradients_that_it_has_without(way: str | None) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 1, 8, 8)
    expected = [g.double().numpy() for g in gradients(model.double(), x.double())]
    model.float()
    kernels.pin(way)
    with faster.Faster() as mode:
        found = gradients(model, x)
    if way is not None:
        assert mode.is_of_use is (way != "torch")
    assert len(found) == len(expected) == 6
    for g, right in zip(found, expected, strict=True):
        assert distance(g, right) < ROUNDING
        assert distance(g, 0.99 * right) > 100 * ROUNDING  # control


def test_the_mode_is_of_no_use_where_torchs_kernels_have_been_found_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Model(), torch.randn(6, 1, 8, 8)
    for name in ("torch", "onednn"):
        forget()
        monkeypatch.setattr(
            kernels, "_choice", lambda _, ways, name=name: name if name in ways else "torch"
        )
        for _ in range(3):  # from the first step on: what is computed does not depend on the step
            with faster.Faster() as mode:
                gradients(model, x)
            assert mode.is_of_use is (name != "torch")


def test_the_mode_is_of_no_use_to_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 2**20)
    monkeypatch.setattr(faster, "SMALL", 2**20)
    model, x = Model(), torch.randn(6, 1, 8, 8)
    expected = gradients(model, x)
    with faster.Faster() as mode:
        found = gradients(model, x)
    assert not mode.is_of_use
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_and_vmap_go_their_own_way_under_the_mode() -> None:
    model, x = Model(), torch.randn(6, 1, 8, 8)
    with faster.Faster(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    expected = model(x)
    with faster.Faster():
        each = torch.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(each, expected)


def test_memory_for_large_results_is_like_any_other() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = kernels.empty((3, 4), torch.zeros(1, dtype=dtype))
        assert found.shape == (3, 4)
        assert found.dtype == dtype
        assert found.fill_(2).sum() == 24


def losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).square().sum(1)


def test_plain_steps_take_the_faster_kernels_where_they_are_of_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, batch = ab.Objective(losses), (torch.randn(6, 1, 8, 8),)
    entered: list[str] = []
    begin = faster.Faster.__enter__
    monkeypatch.setattr(faster.Faster, "__enter__", lambda self: entered.append("") or begin(self))
    found = {}
    for name in ("torch", "onednn"):
        torch.manual_seed(0)
        model = Model()
        forget()
        monkeypatch.setattr(
            kernels, "_choice", lambda _, ways, name=name: name if name in ways else "torch"
        )
        entered.clear()
        for _ in range(3):
            ab.batch_gradient(model, objective, batch)
        found[name] = len(entered), [p.grad.double().numpy() for p in model.parameters()]
    assert (found["torch"][0], found["onednn"][0]) == (1, 3)  # once to learn that it is of no use
    for mine, theirs in zip(found["onednn"][1], found["torch"][1], strict=True):
        assert distance(torch.from_numpy(mine), theirs) < ROUNDING
    monkeypatch.setenv("ANYBATCH_KERNELS", "torch")
    entered.clear()
    ab.batch_gradient(Model(), objective, batch)
    assert not entered
