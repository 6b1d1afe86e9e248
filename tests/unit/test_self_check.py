"""Self-check on a few examples: what it finds, what it accepts, and that it leaves no trace.

Oracle: plain autograd on the whole batch, in float64. Control: with self_check=False the same
layouts give a gradient that is off by more than a thousandth, so that there is something to find.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError
from anybatch.gradient import self_check, survey

CUT = ab.Layout(6)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(18, 4, generator=generator, dtype=dtype)
    return x, torch.randint(3, (18,), generator=generator)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def plainly(model, batch):
    return entropy(model(batch[0]), batch[1])


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(losses, batch, **options):
    """Return the relative distance of a cut gradient from plain autograd on the whole batch."""
    model = network(batch[0].dtype)
    losses(model, batch).mean().backward()
    whole = gradient(model).double()
    model.zero_grad()
    ab.batch_gradient(model, ab.Objective(losses), batch, **{"layout": CUT, **options})
    return float((gradient(model).double() - whole).norm() / whole.norm())


def functional_norm(model, batch):
    h = F.batch_norm(model[0](batch[0]), None, None, training=True)
    return entropy(model[2](h), batch[1])


def similarity(model, batch):
    z = model(batch[0])
    return entropy(z, batch[1]) + 0.1 * (z @ z.T).mean(1)


def softmax_over_the_batch(model, batch):
    z = model(batch[0])
    return entropy(z * torch.softmax(z[:, :1], 0), batch[1])


def one_per_cent(model, batch):
    h = model[0](batch[0])
    return entropy(model[2]((0.99 * h + 0.01 * h.mean(0)).tanh()), batch[1])


def place_in_the_batch(model, batch):
    return plainly(model, batch) * (1 + 0.1 * torch.arange(len(batch[1])))


def normalising_hook(model, batch):
    h = model[0](batch[0])
    h.register_hook(lambda g: g / g.norm())
    return entropy(model[2](h.tanh()), batch[1])


class Whiten(torch.autograd.Function):
    """Subtracts the mean over the batch in the backward pass alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d - d.mean(0)


def whitening(model, batch):
    return entropy(model[2](Whiten.apply(model[0](batch[0]))), batch[1])


COUPLED = [functional_norm, similarity, softmax_over_the_batch, one_per_cent, place_in_the_batch]
ON_THE_WAY_BACK = [normalising_hook, whitening]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("losses", COUPLED, ids=lambda f: f.__name__)
def test_examples_that_are_coupled_outside_of_layers_are_found(losses, dtype):
    batch = data(dtype)
    with pytest.raises(ModelError, match=r"depends on how they are cut.*couples examples"):
        distance(losses, batch)
    assert distance(losses, batch, self_check=False) > 1e-3  # the control


@pytest.mark.parametrize("losses", ON_THE_WAY_BACK, ids=lambda f: f.__name__)
def test_ways_back_that_are_not_linear_are_found(losses):
    with pytest.raises(ModelError, match="losses of the examples are the same, so the backward"):
        distance(losses, data())
    assert distance(losses, data(), self_check=False) > 1e-3  # the control


def test_a_clamp_is_the_same_in_each_layout_without_counts_and_refused_with_them():
    def clamp_gradient(model, batch):
        h = model[0](batch[0])
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return entropy(model[2](h.tanh()), batch[1])

    def count_calls(model, batch):
        counts = 1 + batch[1].double()
        return ab.ExampleLosses(clamp_gradient(model, batch) * counts, counts)

    assert distance(clamp_gradient, data()) < 1e-12
    model = network()
    with pytest.raises(ModelError, match="depends on how they are cut"):
        ab.batch_gradient(model, ab.Objective(count_calls), data(), layout=CUT)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_coupling_shows_under_autocast_too(precision):
    batch = data(torch.float32)
    with pytest.raises(ModelError, match="couples examples"):
        distance(one_per_cent, batch, precision=precision)
    assert distance(plainly, batch, precision=precision) < 0.02  # rounding of the narrow type


def stuck(model, batch):
    """Model at an optimum, where the gradients of the micro-batches cancel."""
    return (model(batch[0])[:, 0] - batch[2]) ** 2


def test_a_model_at_its_optimum_is_no_false_alarm():
    x, _ = data(torch.float32)
    target = torch.randn(18, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(4, 1)
    design = torch.cat([x, torch.ones(18, 1)], 1).double()
    solved = torch.linalg.lstsq(design[:8], target[:8, None].double()).solution[:, 0].float()
    with torch.no_grad():
        model.weight.copy_(solved[None, :4])
        model.bias.copy_(solved[4:])
    batch = x[:8], torch.zeros(8), target[:8]
    ab.batch_gradient(model, ab.Objective(stuck), batch, layout=ab.Layout(8))
    ab.batch_gradient(model, ab.Objective(stuck), batch, layout=ab.Layout((4, 4)))
    parts = torch.stack([(model(x[i : i + 1])[0, 0] - target[i]) ** 2 for i in range(8)])
    assert gradient(model).norm() < 1e-4 * parts.sum()  # where it is checked, they do cancel


REDUCTIONS = [ab.Mean(), ab.Sum(), ab.Max(), ab.TopFraction(0.3), ab.Tilted(1.0)]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: type(r).__name__)
def test_the_model_is_left_as_it_was(reduction, monkeypatch):
    """Check that the self-check changes no bit of the first update."""
    model = nn.Sequential(network(torch.float32), nn.BatchNorm1d(3).eval())
    model.register_buffer("seen", torch.zeros(()))
    before = copy.deepcopy(model.state_dict())
    bits = []
    for is_checked in (True, False):
        torch.manual_seed(7)
        objective = ab.Objective(plainly, reduction)
        ab.batch_gradient(model, objective, data(torch.float32), layout=CUT, self_check=is_checked)
        bits.append((gradient(model), torch.rand(3)))
    assert torch.equal(bits[0][0], bits[1][0])
    assert torch.equal(bits[0][1], bits[1][1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_is_made_at_the_1st_10th_and_100th_cut_update_and_anew_in_another_mode(monkeypatch):
    outputs = []
    check = self_check._check
    monkeypatch.setattr(
        self_check, "_check", lambda update, compare: (outputs.append(1), check(update, compare))
    )
    model, objective = network(), ab.Objective(plainly)
    for t in range(100):
        ab.batch_gradient(model, objective, data(), layout=CUT)
        assert sum(outputs) == 1 + (t >= 9) + (t >= 99)
    ab.batch_gradient(model, objective, data())  # not cut
    assert sum(outputs) == 3
    model.eval()
    ab.batch_gradient(model, objective, data(), layout=CUT)
    assert sum(outputs) == 4
    assert survey.get_facts(model, plainly, survey.survey_model(model).mode).num_cut == 1


def test_a_coupling_that_begins_later_is_found_at_the_10th_update():
    model, calls = network(), []

    def losses(model, batch):
        return (similarity if len(calls) > 3 else plainly)(model, batch)

    objective = ab.Objective(losses)
    for t in range(9):
        ab.batch_gradient(model, objective, data(), layout=CUT)
        calls.append(t)
    with pytest.raises(ModelError, match="couples examples"):
        ab.batch_gradient(model, objective, data(), layout=CUT)


def test_a_loss_that_holds_the_model_itself_is_checked_too():
    model = network()

    def losses(_, batch):
        return similarity(model, batch)

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="couples examples"):
        ab.batch_gradient(model, ab.Objective(losses), data(), layout=CUT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_state_of_the_model_itself_is_left_alone_where_the_loss_holds_it():
    model = nn.Sequential(network(), nn.BatchNorm1d(3).double())
    model.calls = 0

    def losses(modules, batch):
        model.calls += 1
        with torch.no_grad():
            model[1](batch[0][:, :3])  # moves its statistics
        return plainly(modules[0], batch)

    result = []
    for is_checked in (True, False):
        state = copy.deepcopy(model.state_dict())
        objective = ab.Objective(losses, grain=6)
        how = {"key": ab.Key(0, 0), "self_check": is_checked, "layout": CUT}
        model.calls = 0
        ab.batch_gradient(model, objective, data(), **how)
        result.append((model.calls, model[1].running_mean.clone()))
        model.load_state_dict(state)
    assert result[0][0] == result[1][0] == 3
    assert torch.equal(result[0][1], result[1][1])


class Uncopied(nn.Module):
    """Cannot be copied."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def __deepcopy__(self, memo):
        raise TypeError("no copies")

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("losses", [plainly, similarity])
def test_a_model_that_cannot_be_copied_is_checked_in_its_place(losses):
    model = Uncopied()
    before = copy.deepcopy(model.inner.state_dict())
    try:
        ab.batch_gradient(model, ab.Objective(losses), data(), layout=CUT)
        result = None
    except ModelError as error:
        result = str(error)
    assert (result is None) == (losses is plainly)
    after = model.inner.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_error_inside_the_check_becomes_its_own_message():
    def losses(model, batch):
        return plainly(model, batch) + 0 * torch.ones(6, dtype=torch.float64)  # 6 at a time alone

    model = network()
    with pytest.raises(ModelError, match=r"cannot be checked.*any number of examples.*self_check"):
        ab.batch_gradient(model, ab.Objective(losses), data(), layout=CUT)
    assert all(p.grad is None for p in model.parameters())
    ab.batch_gradient(model, ab.Objective(losses), data(), layout=CUT, self_check=False)
    result = gradient(model)
    model.zero_grad()
    plainly(model, data()).mean().backward()
    assert (result - gradient(model)).norm() < 1e-12 * result.norm()


def test_a_reduction_for_one_size_of_batch_is_no_hindrance():
    weights = torch.linspace(1, 2, 18, dtype=torch.float64)
    model = network()
    objective = ab.Objective(plainly, lambda losses: (losses.values * weights).sum())
    ab.batch_gradient(model, objective, data(), layout=CUT)
    result = gradient(model)
    model.zero_grad()
    (plainly(model, data()) * weights).sum().backward()
    assert (result - gradient(model)).norm() < 1e-12 * result.norm()


def test_lists_and_counters_of_the_losses_are_left_alone():
    features, counter = [], {"calls": 0}

    def losses(model, batch):
        features.append(model[0](batch[0]).detach())
        counter["calls"] += 1
        return plainly(model, batch)

    ab.batch_gradient(network(), ab.Objective(losses), data(), layout=CUT)
    assert [len(h) for h in features] == [6, 6, 6]
    assert counter == {"calls": 3}


def test_where_it_is_off_the_records_of_a_run_say_so(tmp_path):
    def train(name, **options):
        model = network(torch.float32)
        steps = ab.steps(
            model,
            ab.Objective(plainly),
            torch.optim.SGD(model.parameters(), lr=0.1),
            data(torch.float32),
            order=ab.Order(18, batch_size=9, seed=0),
            epochs=1,
            run=tmp_path / name,
            **options,
        )
        assert len(list(steps)) == 2
        rows = map(json.loads, (tmp_path / name / "records.jsonl").read_text().splitlines())
        return [row.get("self_check") for row in rows if row["kind"] == "session"]

    assert train("off", self_check=False) == [False]
    assert train("on") == [None]


SWITCHES = [
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('medium')",
]


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_precision_are_left_as_they_were(switch):
    """Run in a new process: torch does not allow the old and the new switches together."""
    code = (
        f"import torch, anybatch as ab\n{switch}\n"
        "read = lambda: [torch.backends.mkldnn.matmul.fp32_precision,"
        " torch.backends.cuda.matmul.fp32_precision]\n"
        "before, model = read(), torch.nn.Linear(4, 1)\n"
        "objective = ab.Objective(lambda model, x: model(x)[:, 0].square())\n"
        "ab.batch_gradient(model, objective, torch.randn(18, 4), layout=ab.Layout(6))\n"
        "assert read() == before, (read(), before)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_check_that_does_not_fit_in_memory_is_left_out_and_reported(monkeypatch, caplog):
    def check_few(*args, **options):
        raise torch.OutOfMemoryError("too large")

    x, y = data()
    cases = [((x[:2], y[:2]), ab.Layout(1)), ((x, y), CUT)]
    for batch, layout in cases:
        assert distance(plainly, batch, layout=layout) < 1e-12  # rounding of float64
    assert caplog.messages == []  # the control
    monkeypatch.setattr(self_check, "_check_few", check_few)
    for batch, layout in cases:
        assert distance(plainly, batch, layout=layout) < 1e-12
        (message,) = caplog.messages
        assert message.startswith("The layout was not checked")
        caplog.clear()
