"""`accelerate.backward`, `skorch.ExactNet` and `keras.ExactModel` with the real packages.

Oracle: plain autograd of the mean over the whole batch, in float64.
"""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError

os.environ.setdefault("KERAS_BACKEND", "torch")
N = 20
X = torch.linspace(-2, 2, 3 * N).reshape(N, 3).double().sin()
Y = torch.arange(N) % 4
LAYOUTS = [None, ab.Layout(4), ab.Layout(1), ab.Layout((1, 7, 2, 6))]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1].long(), reduction="none")


def vector(model, gradient=False):
    values = [p.grad if gradient else p.detach() for p in model.parameters()]
    return torch.cat([v.flatten() for v in values])


def distance(one, other):
    return float((one - other).norm() / other.norm())


def sgd_by_hand(model, batches, lr=0.1):
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return vector(model)


# ---------------------------------------------------------------------------------- Accelerate


def cut(sizes):
    return list(zip(X[: sum(sizes)].split(sizes), Y[: sum(sizes)].split(sizes), strict=True))


@pytest.mark.parametrize("sizes", [(16,), (8, 8), (4, 4, 4, 4), (1,) * 16, (6, 6, 4)], ids=str)
def test_accelerate_has_the_gradient_of_the_whole_batch(sizes):
    accelerate = pytest.importorskip("accelerate", reason="the accelerate extra is missing")
    from anybatch.integrations.accelerate import backward

    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gradient = backward(
        accelerator,
        model,
        ab.Objective(losses),
        cut(sizes),
        key=ab.Key(0, 0),
        observe=ab.Observe(norms=True),
    )
    optimizer.step()
    assert distance(vector(model), sgd_by_hand(network(), [(X[:16], Y[:16])])) < 1e-14
    assert gradient.ledger.norms.shape == (16,)


def test_accumulating_with_accelerate_itself_differs_at_a_ragged_end():  # the control
    accelerate = pytest.importorskip("accelerate", reason="the accelerate extra is missing")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = accelerator.prepare(network())
    for batch in cut((6, 6, 4)):
        with accelerator.accumulate(model):
            accelerator.backward(losses(model, batch).mean())
    result = vector(model, gradient=True)
    other = network()
    losses(other, (X[:16], Y[:16])).mean().backward()
    assert distance(result, vector(other, gradient=True)) > 1e-3


def test_accelerates_autocast_is_the_updates_own():
    accelerate = pytest.importorskip("accelerate", reason="the accelerate extra is missing")
    from accelerate.state import AcceleratorState

    from anybatch.integrations.accelerate import backward, use_bare_forward

    AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        model = accelerator.prepare(network().float())
        batches = [(x.float(), y) for x, y in cut((8, 8))]
        backward(accelerator, model, ab.Objective(losses), batches)
        result = vector(model, gradient=True)
        forward = model.forward
        other = network().float()
        ab.batch_gradient(
            other, ab.Objective(losses), ab.MicroBatches(batches), precision="bfloat16"
        )
        assert torch.equal(result, vector(other, gradient=True))
        assert model.forward is forward  # it is wrapped again
        with torch.no_grad(), use_bare_forward(model):
            assert torch.equal(model(batches[0][0]), other(batches[0][0]))
        with torch.no_grad():  # the control
            assert not torch.equal(model(batches[0][0]), other(batches[0][0]))
    finally:
        AcceleratorState._reset_state()


# -------------------------------------------------------------------------------------- skorch


def make_net(**how):
    from anybatch.integrations.skorch import ExactNet

    how = {"objective": ab.Objective(losses), "train_split": None, "max_epochs": 2} | how
    return ExactNet(
        network(), lr=0.1, batch_size=8, verbose=0, iterator_train__shuffle=False, **how
    )


@pytest.mark.parametrize("layout", [None, ab.Layout(4), ab.Layout(1)], ids=str)
def test_skorch_has_the_updates_of_whole_batches(layout):
    pytest.importorskip("skorch", reason="the skorch extra is missing")
    net = make_net(layout=layout).fit(X, Y)
    batches = list(zip(X.split(8), Y.split(8), strict=True)) * 2
    assert distance(vector(net.module_), sgd_by_hand(network(), batches)) < 1e-13
    assert net.num_updates_ == 6
    assert net.history[0, "train_loss"] > net.history[1, "train_loss"]


def test_skorchs_callbacks_validation_and_copies_stay():
    skorch = pytest.importorskip("skorch", reason="the skorch extra is missing")
    from sklearn.base import clone

    accuracy = skorch.callbacks.EpochScoring(
        lambda net, X, y: float((net.predict(X).argmax(1) == np.asarray(y)).mean()),
        lower_is_better=False,
        name="accuracy",
    )
    net = make_net(
        train_split=skorch.dataset.ValidSplit(2, stratified=False),
        callbacks=[accuracy],
        observe=ab.Observe(norms=True),
    ).fit(X, Y.numpy())
    assert 0 <= net.history[-1, "accuracy"] <= 1
    assert np.isfinite(net.history[-1, "valid_loss"])
    assert net.gradient_.ledger.norms.shape == (2,)
    assert clone(net).objective == net.objective


def test_every_evaluation_of_a_skorch_update_draws_the_same():
    pytest.importorskip("skorch", reason="the skorch extra is missing")
    draws = []

    def noisy(model, batch):
        draws.append(torch.rand(()).item())
        return losses(model, batch) * (1 + 0 * draws[-1])

    net = make_net(objective=ab.Objective(noisy, grain=8), optimizer=torch.optim.LBFGS)
    net.set_params(optimizer__max_iter=4, max_epochs=1).fit(X[:16], Y[:16])
    assert net.num_updates_ == 2
    assert len(draws) > 4
    assert len(set(draws[1:])) == 2  # the first draw shows that the model draws


def test_skorch_without_an_objective_is_refused():
    pytest.importorskip("skorch", reason="the skorch extra is missing")
    with pytest.raises(ModelError, match="ExactNet has no objective"):
        make_net(objective=None).fit(X, Y)


# --------------------------------------------------------------------------------------- Keras


def make_model(**how):
    import keras

    from anybatch.integrations.keras import ExactModel

    keras.backend.set_floatx("float64")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(5, activation="tanh")(inputs)
    hidden = keras.layers.Dropout(how.pop("dropout", 0.0))(hidden)
    outputs = keras.layers.Dense(4)(hidden)
    how = {"objective": ab.Objective(losses)} | how
    model = ExactModel(inputs, outputs, **how)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    return model


@pytest.fixture
def float64():
    keras = pytest.importorskip("keras", reason="the keras extra is missing")
    before = keras.backend.floatx()
    yield
    keras.backend.set_floatx(before)


def list_in_layer_order(model):
    """Weights in the order of the layers: `parameters()` sorts by name, dense_10 before dense_9."""
    return torch.cat([w.value.detach().flatten() for w in model.trainable_weights])


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("layers_before", [0, 9])
def test_keras_has_the_updates_of_whole_batches(float64, layout, layers_before):
    import keras

    keras.backend.clear_session()  # names count from 0 again
    for _ in range(layers_before):
        keras.layers.Dense(1)
    model, other = make_model(layout=layout), make_model()
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(X.numpy(), Y.numpy(), **fit).history["loss"]
    batches = list(zip(X.split(8), Y.split(8), strict=True)) * 2
    for x, y in batches:
        other.zero_grad()
        losses(other, (x, y)).mean().backward()
        with torch.no_grad():
            for p in other.parameters():
                p -= 0.1 * p.grad
    # Keras itself rounds the sum over a batch to 1e-7 in places, with float64 too.
    assert distance(list_in_layer_order(model), list_in_layer_order(other)) < 1e-7
    assert history[1] < history[0]
    assert model.gradient.num_examples == 4


def test_keras_evaluates_and_drops_out_in_updates_alone(float64):
    modes = []

    def watch_calls(model, batch):
        outputs = model(batch[0])
        modes.append(bool((outputs - model(batch[0])).abs().max() > 0))
        return ab.ExampleLosses(
            F.cross_entropy(outputs, batch[1].long(), reduction="none"),
            outputs={"predictions": outputs},
        )

    model = make_model(objective=ab.Objective(watch_calls, grain=4), dropout=0.5)
    model.compile(optimizer="sgd", metrics=["sparse_categorical_accuracy"])
    history = model.fit(
        X.numpy(), Y.numpy(), batch_size=8, epochs=1, verbose=0, validation_data=(X, Y)
    ).history
    assert {"loss", "val_loss", "sparse_categorical_accuracy"} <= history.keys()
    assert modes[0]
    assert not modes[-1]


def test_keras_weights_and_no_objective_are_refused(float64):
    with pytest.raises(ModelError, match="fit got sample_weight"):
        make_model().fit(X.numpy(), Y.numpy(), sample_weight=np.ones(N), verbose=0)
    with pytest.raises(ModelError, match="ExactModel has no objective"):
        make_model(objective=None).fit(X.numpy(), Y.numpy(), verbose=0)
