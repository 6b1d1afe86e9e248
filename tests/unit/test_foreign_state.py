"""State that models and losses of others change while they run: exact, or refused by name.

Oracle: the same code in plain PyTorch, once over the whole batch, in float64; tolerance 1e-10,
relative. Control: with self_check=False what is refused gives another gradient or state.
"""

from collections import Counter, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import anybatch as ab
from anybatch.errors import ModelError
from foreign import X, Y, distance, entropy, flat, network

CUTS = [6, 5, 4, 2, 1]


class Layer(nn.Module):
    """A linear layer with state, whose forward pass is given."""

    def __init__(self, forward, **state):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.own = nn.Linear(4, 3), forward
        for name, make in state.items():
            value = make() if callable(make) else make
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif name.startswith("buffer"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.double()

    def forward(self, x):
        return self.own(self, x)


class Held:
    """A plain object, such as the state of a cell."""

    def __init__(self):
        self.mean, self.calls = 0, 0


def mean_of(h):
    return h.detach().mean(0)


def hide_state(m, x):
    h = m.linear(x)
    out = h if m.hidden is None else h + m.hidden
    m.hidden = mean_of(h)
    return out


def calls(m, x):
    m.calls += 1
    return m.linear(x) * m.calls


def warm_up(m, x):
    m.calls += 1
    return m.linear(x) * (2 if m.calls > 100 else 1)


def append_to_list(m, x):
    h = m.linear(x)
    m.features.append(mean_of(h))
    return h + sum(m.features)


def append_to_queue(m, x):
    h = m.linear(x)
    out = h + sum(m.queue)
    m.queue.append(mean_of(h))
    return out


def by_name(m, x):
    h = m.linear(x)
    out = h + m.states["a"].get("h", 0)
    m.states["a"]["h"] = mean_of(h)
    return out


def in_an_object(m, x):
    h = m.linear(x)
    out = h + m.held.mean
    m.held.mean = mean_of(h)
    return out


def count_in_an_object(m, x):
    m.held.calls += 1
    return m.linear(x) * (2 if m.held.calls > 50 else 1)


def in_an_array(m, x):
    m.array[0] += 1
    return m.linear(x) * float(m.array[0])


def in_a_tensor(m, x):
    m.tensor.data += 1
    return m.linear(x) * m.tensor


def in_a_counter(m, x):
    m.counter["calls"] += 1
    return m.linear(x) * m.counter["calls"]


def first_time(m, x):
    is_first, m.is_first = m.is_first, False
    return m.linear(x) * (2 if is_first else 1)


STATES = {
    "hidden": (hide_state, {"hidden": None}),
    "calls": (calls, {"calls": 0}),
    "calls, from 100 on": (warm_up, {"calls": 0}),
    "features": (append_to_list, {"features": list}),
    "queue": (append_to_queue, {"queue": lambda: deque(maxlen=3)}),
    "states": (by_name, {"states": lambda: {"a": {}}}),
    "held": (in_an_object, {"held": Held}),
    "held, from 50 on": (count_in_an_object, {"held": Held}),
    "array": (in_an_array, {"array": lambda: np.zeros(2)}),
    "tensor": (in_a_tensor, {"tensor": lambda: torch.ones((), dtype=torch.float64)}),
    "counter": (in_a_counter, {"counter": Counter}),
    "is_first": (first_time, {"is_first": True}),
}


def make(forward, state):
    return Layer(forward, **state)


@pytest.mark.parametrize("name", STATES)
def test_state_in_attributes_is_refused_when_cut_and_in_a_run(name):
    attribute = name.split(",")[0]
    for size, check in [*((size, True) for size in CUTS), (None, "run")]:
        how = {"layout": ab.Layout(size), "self_check": check}
        with pytest.raises(ModelError, match=f"changes the attribute '{attribute}'"):
            ab.batch_gradient(make(*STATES[name]), ab.Objective(entropy), (X, Y), **how)


@pytest.mark.parametrize("name", STATES)
def test_state_in_attributes_passes_uncut_and_without_a_run(name):
    right, model = make(*STATES[name]), make(*STATES[name])
    entropy(right, (X, Y)).mean().backward()
    ab.batch_gradient(model, ab.Objective(entropy), (X, Y))
    assert distance(flat(model), flat(right)) < 1e-10


def test_the_control_of_attributes():
    right, wrong = make(*STATES["calls"]), make(*STATES["calls"])
    entropy(right, (X, Y)).mean().backward()
    how = {"layout": ab.Layout(6), "self_check": False}
    ab.batch_gradient(wrong, ab.Objective(entropy), (X, Y), **how)
    assert distance(flat(wrong), flat(right)) > 0.1


def cache_output(m, x):
    m.cache = m.linear(x)
    return m.cache


def gathered(m, x):
    h = m.linear(x)
    m.features.append(h.detach())
    m.held.calls += 1
    return h


@pytest.mark.parametrize(
    ("forward", "state"),
    [
        (cache_output, {}),
        (cache_output, {"cache": None}),
        (gathered, {"features": list, "held": Held}),
    ],
)
def test_attributes_that_are_only_written_pass(forward, state):
    right = Layer(forward, **state)
    entropy(right, (X, Y)).mean().backward()
    for size in CUTS:
        model = Layer(forward, **state)
        ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))
        assert distance(flat(model), flat(right)) < 1e-10
        if state.get("held"):  # the check has left nothing
            assert len(model.features) == model.held.calls == -(-12 // size)


class Recorder:
    """Losses that keep records of their calls."""

    def __init__(self):
        self.sizes, self.calls, self.sum = [], 0, torch.zeros(1)

    def __call__(self, model, batch):
        self.sizes.append(len(batch[0]))
        self.calls += 1
        self.sum += 1
        return entropy(model, batch)


@pytest.mark.parametrize("size", [6, "auto"])
def test_the_check_and_the_choice_of_a_micro_batch_leave_the_object_of_the_losses_alone(size):
    losses = Recorder()
    ab.batch_gradient(network(), ab.Objective(losses), (X, Y), layout=ab.Layout(size))
    sizes = [12] if size == "auto" else [6, 6]
    assert (losses.sizes, losses.calls, losses.sum.item()) == (sizes, len(sizes), len(sizes))


def store_nested(x):
    return (x - x.mean(0)).square().mean(0).sqrt()


def initialises(m, x):
    if not m.buffer_ready:
        with torch.no_grad():
            m.scale.copy_(1 / (store_nested(x) + 1e-3))
            m.buffer_ready.fill_(True)
    return m.linear(x * m.scale)


def initialises_anew(m, x):
    if not m.buffer_ready:
        m.scale.data = 1 / (store_nested(x) + 1e-3)
        m.buffer_ready.fill_(True)
    return m.linear(x * m.scale)


def decays(m, x):
    with torch.no_grad():
        m.scale.mul_(0.9)
    return m.linear(x * m.scale)


def clips(m, x):
    with torch.no_grad():
        m.scale.clamp_(-0.5, 0.5)
    return m.linear(x * m.scale)


def normalises(m, x):
    with torch.no_grad():
        m.scale.div_(m.scale.norm())
    return m.linear(x * m.scale)


def scale_output(forward):
    scale = nn.Parameter(torch.tensor([1.0, -2, 3, 0.1]))
    return Layer(forward, scale=scale, buffer_ready=torch.tensor(False))


@pytest.mark.parametrize("size", [6, 5, 4, 2])
@pytest.mark.parametrize("forward", [initialises, initialises_anew, decays])
def test_parameters_that_a_cut_batch_would_leave_otherwise_are_refused(forward, size):
    layout = ab.Layout(size)
    with pytest.raises(ModelError, match=r"changes (the|a) parameter|depends on how they are cut"):
        ab.batch_gradient(scale_output(forward), ab.Objective(entropy), (X, Y), layout=layout)


@pytest.mark.fast(5)
@pytest.mark.parametrize("size", [None, "auto", *CUTS])
@pytest.mark.parametrize("forward", [clips, normalises])
def test_weights_that_each_pass_clips_alike_are_exact_from_the_first_update_on(forward, size):
    right, model = scale_output(forward), scale_output(forward)
    entropy(right, (X, Y)).mean().backward()
    for _ in range(2):
        ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))
        assert distance(flat(model), flat(right)) < 1e-10


@pytest.mark.parametrize("forward", [initialises, initialises_anew, decays])
def test_trying_what_fits_changes_no_parameter(forward):
    right, model = scale_output(forward), scale_output(forward)
    entropy(right, (X, Y)).mean().backward()
    ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout("auto"))
    assert distance(flat(model), flat(right)) < 1e-10
    assert torch.equal(model.scale, right.scale)


def update_buffer(change):
    def forward(m, x):
        with torch.no_grad():
            m.buffer.copy_(change(m.buffer, x))
        return m.linear(x)

    return forward


BUFFERS = {
    "largest": (lambda b, x: torch.maximum(b, x.amax(0)), lambda: torch.zeros(4)),
    "smallest": (lambda b, x: torch.minimum(b, x.min()), lambda: torch.tensor(torch.inf)),
    "examples": (lambda b, x: b + len(x), lambda: torch.tensor(0)),
    "examples, as a float": (lambda b, x: b + len(x), lambda: torch.tensor(0.0)),
    "sum": (lambda b, x: b + x.sum(0), lambda: torch.zeros(4)),
    "histogram": (lambda b, x: b + torch.histc(x, 5, -3, 3), lambda: torch.zeros(5)),
    "last": (lambda b, x: x[-1], lambda: torch.zeros(4)),
    "queue": (lambda b, x: torch.cat([x, b])[:20], lambda: torch.zeros(20, 4)),
    "variance": (lambda b, x: 0.9 * b + 0.1 * x.var(0), lambda: torch.zeros(4)),
}


@pytest.mark.parametrize("size", [6, 5, 4, 2])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_without_a_mean_are_refused_when_cut(name, size):
    change, start = BUFFERS[name]
    model = Layer(update_buffer(change), buffer=start)
    with pytest.raises(ModelError, match=r"changes the buffer buffer|The buffer 'buffer' of"):
        ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))


@pytest.mark.parametrize("size", [None, *CUTS])
@pytest.mark.parametrize(
    "change", [lambda b, x: b + 1, lambda b, x: 0.9 * b + 0.1 * x.mean(0)], ids=["updates", "mean"]
)
def test_counters_of_updates_and_running_means_are_those_of_the_whole_batch(change, size):
    right, model = (Layer(update_buffer(change), buffer=lambda: torch.zeros(4)) for _ in range(2))
    right(X)
    ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))
    torch.testing.assert_close(
        model.buffer, right.buffer, rtol=1e-12, atol=1e-14
    )  # a mean of means


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.spectral_norm,
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
    ],
)
def test_normed_weights_are_exact(norm):
    def normalise():
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 3)).double()

    right = normalise()
    entropy(right, (X, Y)).mean().backward()
    for size in CUTS:
        model = normalise()
        ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))
        assert distance(flat(model), flat(right)) < 1e-10
        for name, buffer in right.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)


def test_what_was_refused_once_is_refused_again():
    model = make(*STATES["calls"])
    for size in (6, 6, 4, 1):
        with pytest.raises(ModelError, match="changes the attribute 'calls'"):
            ab.batch_gradient(model, ab.Objective(entropy), (X, Y), layout=ab.Layout(size))
