"""Looking for examples leaves nothing behind: what an update changes is the same, observed or not.

Oracle: the same update unobserved. All that is compared are counts, sizes and values, which must be
equal. The control is an iterator, which cannot be put back, and shows that the passes are made.
"""

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError, ModelError

CALLS: list[int] = []
TOTAL = 0


class Recorder:
    """An object of the user's, with a method that is a hook."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.seen, self.last = Counter(), {"mean": 0.0}

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features.append(output.detach())
        self.seen[len(output)] += 1
        self.last["mean"] = float(output.detach().mean())


class Keeps(nn.Module):
    """Counts its calls, and keeps states in attributes, buffers and generators."""

    num_of_all = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 3).double()
        self.register_buffer("num_calls", torch.zeros(()))
        self.calls, self.features = 0, deque(maxlen=3)
        self.mean, self.hidden = torch.zeros(3, dtype=torch.float64), None
        self.cache: dict[str, Tensor] = {}
        self.sizes, self.histogram = set(), np.zeros(3)
        self.draws, self.numpy = random.Random(0), np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.calls += 1
        self.num_calls += 1
        self.features.append(y.detach())
        self.mean.mul_(0.9).add_(y.detach().mean(0))
        self.hidden = y.detach()
        self.cache[f"call {self.calls}"] = self.hidden
        self.sizes.add(len(x))
        self.histogram[: len(x) % 3 + 1] += 1
        Keeps.num_of_all += 1
        self.draws.random()
        self.numpy.normal()
        torch.randn(2, generator=self.generator)
        return y

    def state(self) -> list[Any]:
        return [
            self.calls,
            float(self.num_calls),
            [f.tolist() for f in self.features],
            self.mean.tolist(),
            None if self.hidden is None else self.hidden.tolist(),
            list(self.cache),
            self.sizes,
            self.histogram.tolist(),
            self.draws.getstate(),
            self.numpy.bit_generator.state,
            self.generator.get_state().tolist(),
        ]


def data() -> Tensor:
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def after_updates(prepare: Callable[[Keeps], Callable[..., Tensor]], observe: Any) -> list[Any]:
    """Return the state of a fresh model after two updates."""
    model, x, num_of_all = Keeps(), data(), Keeps.num_of_all
    losses = prepare(model)
    for _ in range(2):
        ab.batch_gradient(model, ab.Objective(losses), (x,), observe=observe)
    return [*model.state(), Keeps.num_of_all - num_of_all]


def simple(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch).square().sum(1)


def test_states_of_a_model_are_put_back():
    state = after_updates(lambda model: simple, ab.Observe())
    assert state == after_updates(lambda model: simple, None)
    assert state[0] == 2


@pytest.mark.parametrize("is_observed", [False, True])
def test_hooks_and_closures_are_put_back(is_observed):
    features: list[Tensor] = []
    num_calls, recorder = 0, Recorder()

    def prepare(model: Keeps) -> Callable[..., Tensor]:
        model.inner.register_forward_hook(lambda m, args, output: features.append(output))
        model.inner.register_forward_hook(recorder.hook)

        def losses(live: nn.Module, batch: Any) -> Tensor:
            nonlocal num_calls
            global TOTAL
            num_calls, TOTAL = num_calls + 1, TOTAL + 1
            CALLS.append(num_calls)
            assert live is model
            return simple(model, batch)  # the model of the closure

        return losses

    before, total = len(CALLS), TOTAL
    after_updates(prepare, ab.Observe() if is_observed else None)
    assert len(features) == 2
    assert len(recorder.features) == 2
    assert recorder.seen == Counter({8: 2})
    assert recorder.last["mean"] == float(features[-1].detach().mean())
    assert (num_calls, CALLS[before:], TOTAL - total) == (2, [1, 2], 2)


def test_an_iterator_shows_that_two_passes_are_made():
    steps = itertools.count()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        next(steps)
        return simple(model, batch)

    model = Keeps()
    ab.batch_gradient(model, ab.Objective(losses), (data(),), observe=ab.Observe())
    assert next(steps) == 3
    ab.batch_gradient(model, ab.Objective(losses), (data(),), observe=ab.Observe())
    assert next(steps) == 5  # the line before has taken one itself


def test_a_forward_pass_that_writes_into_its_batch_writes_once():
    def losses(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            batch[0].mul_(0.5)
        return simple(model, batch)

    grown = []
    for observe in (None, ab.Observe()):
        x = data()
        try:
            ab.batch_gradient(Keeps(), ab.Objective(losses), (x,), observe=observe)
        except ab.errors.AnybatchError:
            pytest.skip("batches that are written into are refused")
        grown.append(x)
    assert torch.equal(*grown)


def test_gradients_and_generators_stay_as_they_were_after_a_refusal():
    class Coupled(Keeps):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y - y.mean(0)

    model = Coupled()
    before, state = model.state(), torch.get_rng_state()
    weight = model.inner.weight.detach().clone()
    with pytest.raises(LedgerError, match="couples examples"):
        ab.batch_gradient(model, ab.Objective(simple), (data(),), observe=ab.Observe())
    assert model.state() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.inner.weight, weight)
    assert all(p.grad is None for p in model.parameters())


def test_in_a_loop_of_ones_own_the_model_is_put_back():
    states = []
    for is_observed in (False, True):
        model, x = Keeps(), data()
        if is_observed:
            with ab.observe(model):
                simple(model, (x,)).sum().backward()
        else:
            simple(model, (x,)).sum().backward()
        states.append(model.state())
    assert states[0] == states[1]


@pytest.mark.parametrize("is_observed", [False, True])
def test_hooks_of_the_backward_pass_run_once_an_update(is_observed):
    gradients: list[Tensor] = []
    model = Keeps()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        y = model(batch[0][batch[0].argsort(0)[:, 0]])  # rows that move: looked at again
        y.register_hook(lambda d: gradients.append(d))
        return y.square().sum(1)

    x = data().sort(0).values
    for _ in range(3):
        observe = ab.Observe() if is_observed else None
        ab.batch_gradient(model, ab.Objective(losses), (x,), observe=observe)
    assert len(gradients) == 3


def test_a_hook_on_a_parameter_is_no_reason_to_refuse():
    model, steps = Keeps(), itertools.count()
    model.inner.weight.register_hook(lambda g: g.clamp(-0.01, 0.01) + 0 * next(steps))
    ab.batch_gradient(model, ab.Objective(simple), (data(),), observe=ab.Observe())
    assert next(steps) < 2  # none of the trial passes is one of its


@pytest.mark.parametrize("is_observed", [False, True])
def test_gradients_of_inputs_are_made_once_an_update(is_observed):
    """Preserve gradients of inputs that the losses make and the user needs."""
    model = Keeps()
    inputs: list[Tensor] = []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        z = batch[0].detach().clone().requires_grad_()
        model.inputs = z
        return simple(model, (z,))

    for _ in range(2):
        observe = ab.Observe() if is_observed else None
        ab.batch_gradient(model, ab.Objective(losses), (data(),), observe=observe)
        inputs.append(model.inputs.grad)
    x = data().requires_grad_()
    (expected,) = torch.autograd.grad(simple(model, (x,)).mean(), x)
    for gradient in inputs:
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [None, ab.Layout(2)])
@pytest.mark.parametrize("is_observed", [False, True])
def test_a_trainable_tensor_outside_of_the_model_is_refused_by_name(is_observed, layout):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    observe = ab.Observe() if is_observed else None
    objective = ab.Objective(lambda model, batch: scale * simple(model, batch))
    with pytest.raises(ModelError, match=r"trainable tensor 'scale'.*no parameter of the model"):
        ab.batch_gradient(Keeps(), objective, (data(),), observe=observe, layout=layout)
    assert scale.grad is None
