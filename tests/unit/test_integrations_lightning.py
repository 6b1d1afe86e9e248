"""`ExactModule` and `LedgerCallback` in the real Trainer of Lightning.

Oracle: a loop by hand in float64 over whole batches. The control is Lightning itself.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab
from anybatch.errors import ModelError

pl = pytest.importorskip("lightning.pytorch", reason="the lightning extra is missing")

from anybatch.integrations.lightning import ExactModule, LedgerCallback  # noqa: E402
from lightning_trainers import fit as fit_quietly  # noqa: E402
from lightning_trainers import make_trainer  # noqa: E402

N, WINDOW = 22, 8  # the last update of an epoch has 6 examples
X = torch.linspace(-2, 2, 3 * N).reshape(N, 3).double().sin()
Y = torch.arange(N) % 4
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)]


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 4)
    return nn.Sequential(*layers).double()


def losses(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


class Module(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plain(Module):
    def training_step(self, batch, batch_idx):
        return losses(self, batch).mean()


class Exact(ExactModule, Module):
    objective = ab.Objective(losses)
    seed = 3


def fit(module, cut, folder, epochs=2, data=(X, Y), **how):
    size, accumulation = cut
    trainer = make_trainer(folder, max_epochs=epochs, accumulate_grad_batches=accumulation, **how)
    fit_quietly(trainer, module, DataLoader(TensorDataset(*data), batch_size=size))
    return trainer


def vector(module, gradient=False):
    values = [p.grad if gradient else p.detach() for p in module.net.parameters()]
    return torch.cat([v.flatten() for v in values])


def by_hand(window, epochs=2, clip=None):
    net = copy.deepcopy(network())
    rate = 0.2
    for _ in range(epochs):
        for start in range(0, N, window):
            net.zero_grad()
            F.cross_entropy(net(X[start : start + window]), Y[start : start + window]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            with torch.no_grad():
                for p in net.parameters():
                    p -= rate * p.grad
            rate *= 0.9
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut_has_the_update_of_the_whole_batch(tmp_path, cut):
    module = Exact(network())
    trainer = fit(module, cut, tmp_path)
    size, accumulation = cut
    assert distance(vector(module), by_hand(size * accumulation)) < 1e-13
    assert trainer.global_step == 6
    assert module.gradient.num_examples == N % (size * accumulation)
    assert trainer.callback_metrics["train_loss"] == pytest.approx(float(module.gradient.loss))


def test_lightning_itself_does_not_at_a_ragged_end(tmp_path):  # the control
    whole, cut = Plain(network()), Plain(network())
    fit(whole, (8, 1), tmp_path)
    assert distance(vector(whole), by_hand(8)) < 1e-13
    fit(cut, (4, 2), tmp_path)
    assert distance(vector(cut), by_hand(8)) > 1e-3


def test_clipping_stays(tmp_path):
    module = Exact(network())
    fit(module, (2, 4), tmp_path, gradient_clip_val=0.1)
    assert distance(vector(module), by_hand(8, clip=0.1)) < 1e-5
    assert distance(vector(module), by_hand(8)) > 1e-2


def test_a_further_cut_changes_nothing(tmp_path):
    module = Exact(network())
    module.layout = ab.Layout(micro_batch=3)
    fit(module, (8, 1), tmp_path)
    assert distance(vector(module), by_hand(8)) < 1e-13


def test_each_batch_of_the_loader_draws_as_one_grain(tmp_path):
    module, other = Exact(network(dropout=0.5)), Exact(network(dropout=0.5))
    fit(module, (4, 2), tmp_path, max_steps=1)
    pieces = list(zip(X[:8].split(4), Y[:8].split(4), strict=True))
    ab.batch_gradient(
        other.train(), ab.Objective(losses), ab.MicroBatches(pieces), key=ab.Key(3, 0)
    )
    with torch.no_grad():
        for p in other.net.parameters():
            p -= 0.2 * p.grad
    assert distance(vector(module), vector(other)) < 1e-13


def test_a_stopped_training_resumes_to_the_same_weights(tmp_path):
    def go(folder, epochs, **how):
        module = Exact(network(dropout=0.5))
        trainer = fit(module, (2, 4), folder, epochs=epochs, **how)
        return module, trainer

    whole, _ = go(tmp_path / "whole", 3)
    _, trainer = go(tmp_path / "half", 2, enable_checkpointing=True)
    module = Exact(network(dropout=0.5))
    checkpoint = trainer.checkpoint_callback.best_model_path
    again = make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=4)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    fit_quietly(again, module, loader, ckpt_path=checkpoint, weights_only=False)
    assert torch.equal(vector(module), vector(whole))


def test_an_order_is_the_sampler(tmp_path):
    order = ab.Order(N, batch_size=8, seed=5)
    module = Exact(network())
    loader = DataLoader(TensorDataset(X, Y), batch_sampler=order.sampler())
    fit_quietly(make_trainer(tmp_path, max_epochs=2), module, loader)
    net, rate = network(), 0.2
    for step in range(order.num_steps(2)):
        ids = order.indices(step)
        net.zero_grad()
        F.cross_entropy(net(X[ids]), Y[ids]).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= rate * p.grad
        rate *= 0.9
    expected = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert distance(vector(module), expected) < 1e-13


def test_the_ledger_of_the_update(tmp_path):
    module = Exact(network())
    module.observe = ab.Observe(norms=True)
    fit(module, (2, 4), tmp_path, max_steps=1)
    norms = []
    for x, y in zip(X[:8], Y[:8], strict=True):
        net = network()
        F.cross_entropy(net(x[None]), y[None]).backward()
        norms.append(torch.cat([p.grad.flatten() for p in net.parameters()]).norm())
    assert torch.allclose(module.gradient.ledger.norms, torch.stack(norms), rtol=1e-9)


@pytest.mark.parametrize("cut", [(8, 1), (4, 2)], ids=str)
def test_the_callback_sees_an_unchanged_module(tmp_path, cut):
    callback = LedgerCallback()
    module, unseen = Plain(network()), Plain(network())
    fit(module, cut, tmp_path, callbacks=[callback], max_steps=1)
    fit(unseen, cut, tmp_path, max_steps=1)
    assert torch.equal(vector(module), vector(unseen))
    for i in range(8):
        net = network()
        F.cross_entropy(net(X[i : i + 1]), Y[i : i + 1]).backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm() / 8
        assert callback.norms[i] == pytest.approx(float(norm), rel=1e-9)


def test_what_does_not_fit_is_refused(tmp_path):
    class Nothing(ExactModule, Module):
        pass

    with pytest.raises(ModelError, match="Nothing has no objective"):
        fit(Nothing(network()), (8, 1), tmp_path)
    manual = Exact(network())
    manual.automatic_optimization = False
    with pytest.raises(ModelError, match="automatic_optimization is False"):
        fit(manual, (8, 1), tmp_path)


BAD = 205
FAR = torch.randn(240, 3, generator=torch.Generator().manual_seed(2)).double()
CLASSES = FAR.abs().argmax(1)
FAR[BAD] *= 50
CLASSES[BAD] = 3


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 4)).double()


class Watched(Exact):
    spikes = ab.SpikeWatch(factor=3.0)


def test_a_spike_names_the_example_and_changes_no_bit(tmp_path):
    module, plain = Watched(linear()), Exact(linear())
    for each in (module, plain):
        fit(each, (2, 4), tmp_path, epochs=1, data=(FAR, CLASSES))
    assert torch.equal(vector(module), vector(plain))
    assert plain.spikes is None
    names = {spike.step: [example.id for example in spike.examples] for spike in module.spikes}
    assert names[BAD // 8] == [BAD % 8]
    assert isinstance(Watched.spikes, ab.SpikeWatch)  # another module begins anew
    assert isinstance(Watched(network()).spikes, ab.SpikeWatch)


def test_a_resumed_training_judges_the_same(tmp_path):
    how = {"data": (FAR, CLASSES), "enable_checkpointing": True}
    whole = Watched(linear())
    fit(whole, (2, 4), tmp_path / "whole", epochs=2, **how)
    first = Watched(linear())
    trainer = fit(first, (2, 4), tmp_path / "half", epochs=1, **how)
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert checkpoint["anybatch_spikes"] == first._finder.history.state_dict()
    again = Watched(linear())
    again.on_load_checkpoint(checkpoint)
    assert again._finder.history.state_dict() == first._finder.history.state_dict()
    assert first.spikes
    assert [str(s) for s in whole.spikes][: len(first.spikes)] == [str(s) for s in first.spikes]


def test_a_training_step_of_ones_own_is_refused(tmp_path):
    class Wrong(Exact):
        def training_step(self, batch, batch_idx):
            return losses(self, batch).mean()

    with pytest.raises(ModelError, match=r"Wrong\.training_step takes the place of ExactModule's"):
        fit(Wrong(network()), (8, 1), tmp_path)


def test_a_precision_with_a_forward_pass_of_its_own_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "precision", property(lambda self: "transformer-engine"))
    with pytest.raises(ModelError, match="precision is 'transformer-engine'"):
        fit(Exact(network()), (8, 1), tmp_path)


def test_bfloat16_is_that_of_the_update(tmp_path):
    def train(precision):
        module = Exact(network().float())
        fit(module, (4, 2), tmp_path, data=(X.float(), Y), precision=precision)
        return vector(module)

    assert 1e-6 < distance(train("bf16-mixed"), train("32-true")) < 0.05
