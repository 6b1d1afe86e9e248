"""Watch for spikes in `steps`: the same bits, the right examples, and a record of them.

Oracles: the same training without the watch, bit for bit; plain autograd of one example for its
norm and its share; what `observe=` says of the same step.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.runs import checkpoints
from anybatch.runs.digest import digest
from anybatch.runs.records import read_recipe_records, read_records
from anybatch.training.spike_rows import gather_rows

N, BATCH, BAD = 400, 10, 333
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
X[BAD] *= 40
Y[BAD] = (Y[BAD] + 1) % 3


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def small():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def drawing():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def couple():
    torch.manual_seed(4)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    return nn.Sequential(*layers)


def spectral():
    torch.manual_seed(4)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 16))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(16, 3))


class Counting(nn.Module):
    """A model with state in buffers and attributes, and draws of its own in the losses."""

    def __init__(self):
        super().__init__()
        self.net = drawing()
        self.register_buffer("mean", torch.zeros(6))
        self.passes = 0

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.passes += 1
        return self.net(x)


class Shifting(nn.Module):
    """A model that uses a buffer, and then changes it."""

    def __init__(self):
        super().__init__()
        self.net = small()
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x):
        result = self.net(x - self.shift)
        self.shift.copy_(x.detach()[0].clamp(-2, 2))
        return result


def train(make=small, spikes=None, epochs=2, data=(X, Y), body=None, **options):
    """Train; return the model, the steps, and all that the training leaves."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    objective = options.pop("objective", ab.Objective(losses, grain=5))
    order = ab.Order(N, batch_size=BATCH, seed=1)
    torch.manual_seed(9)
    rows, gradients = [], []
    for step in ab.steps(
        model, objective, optimizer, data, order=order, epochs=epochs, spikes=spikes, **options
    ):
        rows.append(step)
        gradients.append([p.grad.clone() for p in model.parameters()])
        if body is not None:
            body(model, step)
    left = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "gradients": gradients,
        "draw": torch.rand(3),
        "passes": getattr(model, "passes", None),
    }
    return model, rows, left


def find_spikes(rows):
    return [step.spike for step in rows if step.spike is not None]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (small, {}),
        (small, {"layout": ab.Layout(micro_batch=3)}),
        (small, {"clip": ab.ClipNorm(1.0)}),
        (small, {"clip": ab.ClipExamples(1.0)}),
        (small, {"objective": ab.Objective(losses, reduction=ab.TopFraction(0.5))}),
        (small, {"observe": ab.Observe(norms=True)}),
        (drawing, {}),
        (drawing, {"bitwise": True}),
        (couple, {}),
        (spectral, {"self_check": False}),
        (Counting, {"self_check": False, "layout": ab.Layout(micro_batch=5)}),
    ],
)
def test_the_training_keeps_its_bits(make, options):
    _, plain, expected = train(make, **options)
    _, watched, left = train(make, spikes=ab.SpikeWatch(factor=3.0), **options)
    assert find_spikes(watched)
    assert digest(left) == digest(expected)
    assert [step.loss for step in watched] == [step.loss for step in plain]
    assert not find_spikes(plain)


def test_another_seed_of_the_draws_is_seen():  # the control of the digest
    _, _, one = train(drawing)
    _, _, other = train(lambda: drawing().double(), data=(X.double(), Y))
    assert digest(one) != digest(other)


def test_the_corrupted_example_is_named_with_its_figures():
    """Norm and share against plain autograd, one example after the other."""
    before = []
    _, rows, _ = train(
        spikes=ab.SpikeWatch(), body=lambda model, _: before.append(copy.deepcopy(model))
    )
    spikes = find_spikes(rows)
    hits = [spike for spike in spikes if BAD in [example.id for example in spike.examples]]
    assert hits
    spike = hits[-1]
    assert [example.id for example in spike.examples] == [BAD]
    (example,), model = spike.examples, before[spike.step - 1]
    ids = rows[spike.step].gradient.ids
    each = []
    for i in ids.tolist():
        loss = losses(model, (X[i : i + 1], Y[i : i + 1]))[0]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        each.append(torch.cat([g.flatten() for g in gradients]).double())
    g, place = torch.stack(each), ids.tolist().index(BAD)
    mean = g.mean(0)
    assert example.norm == pytest.approx(float(g[place].norm()), rel=1e-5)
    share = float(g[place] @ mean / (len(ids) * mean @ mean))
    assert example.share == pytest.approx(share, rel=1e-4)
    assert example.share > 0.5
    if spike.signal == "norm":
        assert spike.value == pytest.approx(float(mean.norm()), rel=1e-5)
    assert any("times as long as the median of the batch" in text for text in example.findings)
    assert spike.why is None


def test_clean_data_name_nobody():  # the control
    clean, labels = X.clone(), Y.clone()
    clean[BAD] /= 40
    labels[BAD] = clean[BAD, :3].argmax()
    _, rows, _ = train(spikes=ab.SpikeWatch(factor=8.0), data=(clean, labels))
    assert not [example for spike in find_spikes(rows) for example in spike.examples]


@pytest.mark.parametrize("make", [drawing, spectral, Shifting])
def test_the_second_computation_is_that_of_the_step_itself(make):
    """A model that draws or keeps buffers, against the ledger of the same step."""
    far = X.clone()
    far[[40, 41, 42]] *= 100.0
    how = {"data": (far, Y.flip(0)), "self_check": False}
    _, rows, _ = train(make, spikes=ab.SpikeWatch(factor=3.0), **how)
    observe = ab.Observe(norms=True, share=True)
    _, observed, _ = train(make, observe=observe, **how)
    (*_, spike) = (s for s in find_spikes(rows) if s.examples)
    gradient = observed[spike.step].gradient
    for example in spike.examples:
        place = gradient.ids.tolist().index(example.id)
        assert example.norm == pytest.approx(float(gradient.ledger.norms[place]), rel=1e-4)
        assert example.share == pytest.approx(float(gradient.ledger.share[place]), rel=1e-3)


def test_where_examples_couple_the_losses_choose_and_the_spike_says_why():
    _, rows, _ = train(couple, spikes=ab.SpikeWatch(factor=3.0))
    spike = find_spikes(rows)[0]
    assert spike.why is not None
    assert "Norms and shares are missing" in str(spike)
    assert all(example.norm is None for example in spike.examples)


def test_a_step_that_is_observed_already_is_not_computed_again():
    class Calls:  # a class, whose attributes the second computation does not put back
        number = 0

    def count():
        number, Calls.number = Calls.number, 0
        return number

    def counting(model, batch):
        Calls.number += 1
        return losses(model, batch)

    objective = ab.Objective(counting)
    observe = ab.Observe(norms=True, share=True)
    how = {"objective": objective, "self_check": False}
    train(observe=observe, **how)
    plain = count()
    _, rows, _ = train(spikes=ab.SpikeWatch(), observe=observe, **how)
    assert find_spikes(rows)
    assert count() == plain
    train(spikes=ab.SpikeWatch(), **how)  # the control
    again = count()
    train(**how)
    assert again > count()


def test_a_forward_pass_that_writes_into_its_batch_is_not_run_again():
    def writing(model, batch):
        batch[0].mul_(0.5)
        return losses(model, batch)

    objective = ab.Objective(writing)
    _, rows, _ = train(spikes=ab.SpikeWatch(), objective=objective, self_check=False)
    spikes = find_spikes(rows)
    assert spikes
    assert "has changed its batch" in spikes[0].why


def test_duplicates_and_lengths_are_named():
    tokens = [torch.randint(1, 9, (5 + i % 3,)) for i in range(N)]
    labels = torch.tensor([int(t[0]) % 3 for t in tokens])
    order = ab.Order(N, batch_size=BATCH, seed=1)
    batch = order.indices(35).tolist()
    tokens[batch[4]] = torch.full((90,), 8)
    tokens[batch[7]] = torch.full((90,), 8)
    labels[batch[4]], labels[batch[7]] = 0, 1

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, padded):
            return self.head((self.table(padded.values) * padded.mask[..., None]).sum(1))

    data = list(zip(tokens, labels, strict=True))
    _, rows, _ = train(
        Bag,
        spikes=ab.SpikeWatch(),
        data=data,
        collate=ab.Pad(),
        objective=ab.Objective(losses),
        layout=ab.Layout(micro_batch=4),
        epochs=1,
    )
    spike = rows[35].spike
    texts = {example.id: " / ".join(example.findings) for example in spike.examples}
    assert set(texts) <= {batch[4], batch[7]}
    some = texts[min(texts, key=str)]
    assert "its length is 15 times the median" in some or "its length is 18 times" in some
    assert "the same inputs as example" in some
    assert "with another label" in some


def test_counts_are_the_lengths_of_examples_whose_batch_shows_none():
    counts = torch.arange(1.0, 11)

    def count(model, batch):
        return ab.ExampleLosses(losses(model, batch), counts=counts)

    batch = X[:10], Y[:10]
    for tell, lengths in ((count, counts.tolist()), (losses, None)):
        gradient = ab.batch_gradient(small(), ab.Objective(tell), batch)
        assert gather_rows(gradient, None, batch).get("length") == lengths


def test_a_run_records_the_spike_and_a_resumed_one_judges_the_same(tmp_path):
    watch = ab.SpikeWatch(factor=3.0)
    observe = ab.Observe(norms=True)
    how = {"spikes": watch, "epochs": 4, "observe": observe}
    _, whole, _ = train(run=tmp_path / "whole", **how)
    spikes = find_spikes(whole)
    kinds = [r for r in read_recipe_records(tmp_path / "whole/records.jsonl") if "signal" in r]
    assert [row["step"] for row in kinds] == [spike.step for spike in spikes]
    assert [row["value"] for row in kinds] == [spike.value for spike in spikes]
    assert any(example["id"] == BAD for row in kinds for example in row["examples"])
    late = [example for spike in spikes for example in spike.examples if spike.step >= 40]
    assert any("earlier visit" in text for example in late for text in example.findings)

    run = tmp_path / "parts"
    train(run=run, **{**how, "epochs": 2})
    train(run=run, **how)
    rows = [
        {k: v for k, v in row.items() if k != "seconds"}
        for row in read_records(run / "records.jsonl")
        if row["kind"] == "spike"
    ]
    assert rows == kinds


def test_the_watch_is_no_part_of_the_digest_and_may_come_and_go(tmp_path):
    states = []
    for name, spikes in (("with", ab.SpikeWatch()), ("without", None)):
        train(run=tmp_path / name, epochs=1, spikes=spikes)
        outcome = checkpoints.find_newest(tmp_path / name / "checkpoints").checkpoint
        states.append(outcome.digest)
    assert states[0] == states[1]
    train(run=tmp_path / "with", epochs=2)
    _, rows, _ = train(run=tmp_path / "without", epochs=2, spikes=ab.SpikeWatch())
    assert find_spikes(rows)


def test_a_skipped_update_is_not_judged():
    """float16 begins with a scale that is too large, and skips updates until it fits."""
    hot = X.clone()
    _, rows, _ = train(spikes=ab.SpikeWatch(), precision="float16", data=(hot, Y))
    assert all(step.spike is None for step in rows if step.is_skipped)


def test_another_object_is_refused():
    with pytest.raises(LedgerError, match=r"It must be ab\.SpikeWatch"):
        train(spikes=4.0)
