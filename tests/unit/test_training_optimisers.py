"""Schedulers of torch, and optimisers that evaluate the loss by a closure, in `steps`.

Oracle: the loop that PyTorch's documentation writes for them.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import anybatch as ab
from anybatch.errors import DivergenceError, ModelError, RunError

N, B, UPDATES = 24, 6, 12
X, Y = torch.linspace(-2, 2, 3 * N).reshape(N, 3).double().sin(), torch.arange(N).double().cos()
ORDER = ab.Order(N, batch_size=B, seed=4)
LAYOUTS = [None, ab.Layout(2), ab.Layout((1, 5))]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def losses(model, batch):
    return (model(batch[0])[:, 0] - batch[1]) ** 2


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation over SGD, after Foret et al. 2021, 2010.01412, section 2."""

    def __init__(self, parameters, lr, rho):
        super().__init__(parameters, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "SAM requires closure"
        group = self.param_groups[0]
        grads = [p.grad for p in group["params"]]
        norm = torch.stack([g.norm() for g in grads]).norm()
        moved = [group["rho"] * g / norm for g in grads]
        for p, e in zip(group["params"], moved, strict=True):
            p.add_(e)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, e in zip(group["params"], moved, strict=True):
            p.sub_(e)
            p.sub_(group["lr"] * p.grad)


class SAMByData(SAM):
    """Same, with weights moved through `.data`, as many copies do."""

    def step(self, closure=None):
        assert closure is not None, "SAM requires closure"
        group = self.param_groups[0]
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        old = [p.data for p in group["params"]]
        for p in group["params"]:
            p.data = p.data + group["rho"] * p.grad / norm
        closure()
        for p, data in zip(group["params"], old, strict=True):
            p.data = data - group["lr"] * p.grad


class Newton(torch.optim.Optimizer):
    """Halves its step until the loss falls; its closure has no default."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            before = closure()
        parameters = self.param_groups[0]["params"]
        start, direction = [p.clone() for p in parameters], [p.grad.clone() for p in parameters]
        rate = 1.0
        while rate > 1e-3:
            for p, w, g in zip(parameters, start, direction, strict=True):
                p.copy_(w - rate * g)
            with torch.enable_grad():
                after = closure()
            if after < before:
                return
            rate /= 2


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, history_size=5)


def wolfe(parameters):
    return torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", max_iter=5)


OPTIMISERS = {
    "LBFGS": lbfgs,
    "LBFGS with a line search": wolfe,
    "SAM": lambda parameters: SAM([*parameters], lr=0.1, rho=0.05),
    "SAM by .data": lambda parameters: SAMByData([*parameters], lr=0.1, rho=0.05),
    "a line search of one's own": Newton,
}


def train_by_hand(make, closure=True):
    model = make_model()
    optimizer = make(model.parameters())
    for t in range(UPDATES):
        ids = ORDER.indices(t)

        def evaluate(ids=ids):
            optimizer.zero_grad()
            loss = losses(model, (X[ids], Y[ids])).mean()
            loss.backward()
            return loss

        evaluate()
        optimizer.step(evaluate) if closure else optimizer.step()
    return vector(model)


def train(make, layout=None, **how):
    model = make_model()
    optimizer = make(model.parameters())
    objective = how.pop("objective", ab.Objective(losses))
    for _ in ab.steps(
        model, objective, optimizer, (X, Y), order=ORDER, steps=UPDATES, layout=layout, **how
    ):
        pass
    return vector(model)


@pytest.mark.fast(4)
@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_closure_evaluates_the_same_batch(make, layout):
    expected = train_by_hand(make)
    limit = 1e-5 if make in (lbfgs, wolfe) else 1e-10  # they divide small differences of gradients
    assert (train(make, layout) - expected).norm() / expected.norm() < limit


def test_without_the_second_evaluation_it_ends_elsewhere():  # the control
    one = train_by_hand(OPTIMISERS["SAM"])
    other = train_by_hand(lambda p: torch.optim.SGD(p, lr=0.1), closure=False)
    assert (one - other).norm() / one.norm() > 1e-4


def test_every_evaluation_draws_the_same_random_numbers():
    """With dropout LBFGS with a line search falls apart unless the mask stays the same."""
    masks = []

    def masked(model, batch):
        noise = torch.rand(len(batch[0]))
        masks.append(noise)
        return losses(model, batch) + noise

    list_of_updates = []
    model = make_model()
    for step in ab.steps(
        model,
        ab.Objective(masked, grain=6),
        lbfgs(model.parameters()),
        (X, Y),
        order=ORDER,
        steps=2,
    ):
        list_of_updates.append((step.step, len(masks)))
    start, first, second = 0, list_of_updates[0][1], list_of_updates[1][1]
    visits = [{tuple(m.tolist()) for m in masks[a:b]} for a, b in ((start, first), (first, second))]
    assert second - first > 2
    assert len(visits[1]) == 1
    assert not visits[0] & visits[1]


@pytest.mark.parametrize("make", [lbfgs, OPTIMISERS["SAM"]], ids=["LBFGS", "SAM"])
def test_a_run_that_was_left_ends_with_the_same_bits(tmp_path, make):
    whole = train(make)
    model = make_model()
    arguments = (model, ab.Objective(losses), make(model.parameters()), (X, Y))
    run = ab.Run(tmp_path / "run", checkpoint_every=2)
    loop = ab.steps(*arguments, order=ORDER, steps=UPDATES, run=run)
    list(itertools.islice(loop, 7))
    loop.close()
    assert torch.equal(train(make, run=tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"precision": "float16"}, "LBFGS evaluates the loss itself"),
        ({"shard": True}, "shard=True with LBFGS"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_closure_is_refused(how, message):
    with pytest.raises(ModelError, match=message):
        train(lbfgs, **how)


@pytest.mark.parametrize("make", [lbfgs, OPTIMISERS["SAM"]], ids=["LBFGS", "SAM"])
def test_a_gradient_that_is_not_finite_in_the_middle_of_a_step_is_a_divergence(make):
    calls = []

    def infinite_slope(model, batch):
        calls.append(None)
        values = losses(model, batch)
        return torch.sqrt(values * 0) + values if len(calls) > 1 else values

    with pytest.raises(DivergenceError, match="has moved the weights to where the gradient is not"):
        train(make, objective=ab.Objective(infinite_slope))


def test_an_error_of_the_optimiser_stays_its_own():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        train(lambda parameters: Failing(parameters, lr=0.1))


# ---------------------------------------------------------------------------------- schedulers


def sgd(model):
    return torch.optim.SGD(
        [{"params": [model[0].weight], "lr": 0.2}, {"params": [model[2].weight, model[2].bias]}],
        lr=0.1,
        momentum=0.9,
    )


SCHEDULERS = {
    "steps": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=UPDATES),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "warm-up, then decay": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)],
        milestones=[4],
    ),
}


def schedule_by_hand(make):
    model = make_model()
    optimizer = sgd(model)
    scheduler = make(optimizer)
    rates = []
    for t in range(UPDATES):
        ids = ORDER.indices(t)
        optimizer.zero_grad()
        losses(model, (X[ids], Y[ids])).mean().backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return vector(model), [rate for rate, _ in rates]


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_of_torch_takes_a_step_after_each_update(make):
    expected, rates = schedule_by_hand(make)
    model = make_model()
    optimizer = sgd(model)
    loop = ab.steps(
        model,
        ab.Objective(losses),
        optimizer,
        (X, Y),
        order=ORDER,
        steps=UPDATES,
        schedule=make(optimizer),
    )
    assert [step.lr for step in loop] == rates
    assert (vector(model) - expected).norm() / expected.norm() < 1e-12


@pytest.mark.fast(2)
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("left_after", [1, 5])
def test_a_run_goes_on_where_its_scheduler_was(tmp_path, make, left_after):
    def go(number):
        model = make_model()
        optimizer = sgd(model)
        loop = ab.steps(
            model,
            ab.Objective(losses),
            optimizer,
            (X, Y),
            order=ORDER,
            steps=UPDATES,
            schedule=make(optimizer),
            run=ab.Run(tmp_path / "run", checkpoint_every=2),
        )
        list(itertools.islice(loop, number))
        loop.close()
        return vector(model)

    go(left_after)
    expected, _ = schedule_by_hand(make)
    assert (go(UPDATES) - expected).norm() / expected.norm() < 1e-12


def test_an_object_of_its_name_is_refused():
    model = make_model()
    optimizer = sgd(model)
    scheduler = SCHEDULERS["steps"](optimizer)
    with pytest.raises(RunError, match="state has an object 'schedule'"):
        ab.steps(
            model,
            ab.Objective(losses),
            optimizer,
            (X, Y),
            order=ORDER,
            steps=3,
            schedule=scheduler,
            state={"schedule": scheduler},
        )
