"""Wrong values for every argument: one error that names it, and says what to do.

Each argument of each function is given values of several wrong types. The control is that the
right ones go through, and that every refusal is of the library's own class.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import RandomSampler

import anybatch as ab
from anybatch.errors import AnybatchError, LossError, ModelError

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def update(**value_passed):
    model = value_passed.pop("model", None) or linear()
    objective = value_passed.pop("objective", None) or ab.Objective(cross_entropy)
    return ab.batch_gradient(model, objective, (X, Y), **value_passed)


def train(**value_passed):
    model = value_passed.pop("model", None) or linear()
    optimizer = value_passed.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    objective = value_passed.pop("objective", None) or ab.Objective(cross_entropy)
    data = value_passed.pop("data", (X, Y))
    how = {"order": ab.Order(12, batch_size=5), "epochs": 1} | value_passed
    return list(ab.steps(model, objective, optimizer, data, **how))


def evaluate(**value_passed):
    objective = value_passed.pop("objective", None) or ab.Objective(cross_entropy)
    return ab.evaluate(linear(), objective, value_passed.pop("data", (X, Y)), **value_passed)


def scheduler(kind=StepLR, argument=3):
    return kind(torch.optim.SGD(linear().parameters(), lr=0.1), argument)


UPDATE = {
    "layout": [4, "auto", [4, 8], {"micro_batch": 3}, ab.Layout],
    "observe": [True, "norms", ["norms"], ab.Observe],
    "clip": [1.0, "norm", ab.ClipNorm, nn.utils.clip_grad_norm_],
    "group": [3, "world", True],
    "bitwise": ["yes", None, 1],
    "precision": ["fp16", torch.float16, None, True],
}
ALONE = {
    "key": [3, (0, 1), "seed", torch.Generator()],
    "ids": [[1, 2], np.arange(12.0), ["a"] * 12, "ids", torch.ones(12, dtype=torch.bool)],
    "loss_scale": [0, -1.0, "a", None, float("nan"), float("inf")],
    "reduction_state": ["x", 3, [None]],
    "objective": [cross_entropy, ab.Objective, "mean"],
    "model": [cross_entropy, nn.Linear, [linear()]],
}
LOOP = {
    "order": [None, 4, [0, 1], RandomSampler(range(12))],
    "epochs": [0, -1, 1.5, "3", None, True],
    "collate": ["pad", 3, [ab.Pad()]],
    "transform": ["flip", 3],
    "workers": [1.5, -1, "2", None],
    "schedule": [0.1, "cosine", ab.Constant, lambda a, b: 0.1, lambda examples: None],
    "state": [["a"], "x", torch.optim.SGD(linear().parameters(), lr=0.1)],
    "run": [3, True, b"x", ["a"]],
    "compare_every": [0, -1, 1.5, "a"],
    "shard": ["yes", None, 1],
    "optimizer": [torch.optim.SGD, "adam", list(linear().parameters()), scheduler()],
}
EVALUATION = {
    "micro_batch": [0, -1, 1.5, "auto", None],
    "metrics": [3, "accuracy", [nn.Identity()], nn.Identity()],
    "collate": ["pad", 3],
    "precision": ["half", None],
    "group": [3, "world"],
    "objective": [cross_entropy, ab.Objective],
}


def cases(*tables):
    return [(name, value) for table in tables for name, values in table.items() for value in values]


def refuse_call(function, name, value):
    with pytest.raises(AnybatchError, match=r"\w{3,}") as caught:
        function(**{name: value})
    results = str(caught.value)
    assert name.rstrip("s") in results or name in ("epochs", "compare_every", "ids")
    assert 30 < len(results) < 500


def list_names(value):
    """A name that is the same in every process: no address in memory."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.mark.parametrize(("name", "value"), cases(UPDATE, ALONE), ids=list_names)
def test_batch_gradient_refuses_arguments_of_the_wrong_type(name, value):
    refuse_call(update, name, value)


@pytest.mark.parametrize(("name", "value"), cases(UPDATE, LOOP), ids=list_names)
def test_steps_refuse_arguments_of_the_wrong_type(name, value):
    refuse_call(train, name, value)


@pytest.mark.parametrize(("name", "value"), cases(EVALUATION), ids=list_names)
def test_evaluate_refuses_arguments_of_the_wrong_type(name, value):
    refuse_call(evaluate, name, value)


def test_the_right_arguments_go_through():  # the control
    gradient = update(
        key=ab.Key(0, np.int64(1)),
        layout=ab.Layout(micro_batch=np.int64(4)),
        observe=ab.Observe(),
        clip=ab.ClipNorm(np.float32(1.0)),
        ids=range(12),
        loss_scale=np.float64(2.0),
        reduction_state={},
    )
    schedules = [None, ab.Cosine(0.1, 24), lambda examples: torch.tensor(0.1), lambda n, lr=0.1: lr]
    for schedule in schedules:
        train(schedule=schedule, state={"note": nn.Linear(1, 1)})
    assert gradient.is_finite
    assert evaluate(micro_batch=np.int64(5)) == evaluate(micro_batch=5)


def test_a_clip_that_is_a_number_clips_nothing_silently_no_more():
    with pytest.raises(LossError, match=r"clip is 1\.0\. It must be ab\.ClipNorm\(max_norm\)"):
        update(clip=1.0)


# ----------------------------------------------------------------------------------- schedules


def test_a_scheduler_of_another_optimiser_is_refused():
    with pytest.raises(ModelError, match="the StepLR belongs to another optimiser"):
        train(schedule=scheduler(StepLR, 3))


def test_a_scheduler_that_waits_for_a_metric_is_refused():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"ReduceLROnPlateau needs a metric.*in the body"):
        train(model=model, optimizer=optimizer, schedule=ReduceLROnPlateau(optimizer))


@pytest.mark.parametrize("rate", [None, "a", float("nan"), -0.1, float("inf"), [0.1]])
def test_a_schedule_that_gives_no_rate_is_refused(rate):
    with pytest.raises(ModelError, match="the schedule gave the learning rate"):
        train(schedule=lambda examples: rate)


# --------------------------------------------------------------------------- several optimisers


def test_several_optimisers_are_told_of_parameter_groups():
    model = linear()
    parts = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    with pytest.raises(ModelError, match=r"optimizer is a list. .*parameter groups"):
        train(model=model, optimizer=parts)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-3}]
    train(model=model, optimizer=torch.optim.AdamW(groups))  # the advice


# ------------------------------------------------------------------------- numbers and objectives

NUMBERS = [ab.L2, ab.L1, ab.ClipNorm, ab.ClipExamples, ab.TopFraction, ab.Tilted, ab.GroupDRO]


@pytest.mark.parametrize("kind", [*NUMBERS, ab.Constant])
@pytest.mark.parametrize("value", ["a", None, [0.1], 1j, float("nan"), True, torch.tensor(0.5)])
def test_what_is_no_number_is_refused(kind, value):
    with pytest.raises(AnybatchError, match=kind.__name__):
        kind(value)
    assert kind(np.float32(0.5)) == kind(0.5)


def losses_with(**more):
    def losses(model, batch):
        values = cross_entropy(model, batch)
        return ab.ExampleLosses(values, **{name: make(values) for name, make in more.items()})

    return ab.Objective(losses)


OBJECTIVES = {
    "module": (
        lambda: ab.Objective(nn.CrossEntropyLoss(reduction="none")),
        "example_losses is Cross",
    ),
    "layer": (lambda: ab.Objective(nn.Linear(4, 3)), "example_losses is Linear"),
    "string": (lambda: ab.Objective("mse"), "example_losses is 'mse'.*function of"),
    "torch.mean": (lambda: ab.Objective(cross_entropy, torch.mean), "takes a tensor"),
    "sum of reductions": (lambda: ab.Mean() + ab.Max(), r"Mean\(\) \+ Max\(\) is no reduction"),
    "text times": (lambda: "a" * ab.Mean(), r"Mean\(\) is multiplied by .* finite number"),
    "penalty and number": (lambda: ab.L2(0.1) + 3, "A penalty was added to 3"),
    "drops": (lambda: ab.StepDecay(0.1, at=5), "at=5. It must be numbers of examples"),
    "pattern": (lambda: ab.L2(0.1, on=3), "on is 3. It must be a pattern"),
    "counts in the graph": (lambda: losses_with(counts=lambda v: v.exp()), "part of the graph"),
    "complex counts": (lambda: losses_with(counts=lambda v: 1j * v.detach()), "are complex"),
    "metrics": (lambda: losses_with(metrics=lambda v: [v]), "metrics .* of type list"),
    "sparse": (lambda: ab.Objective(lambda m, b: cross_entropy(m, b).to_sparse()), "layout"),
    "key": (lambda: ab.Key("a", 0), r"Key\(seed='a', step=0\) is no key"),
    "observe": (lambda: ab.Observe(norms="all"), "Observe expects norms to be True or False"),
    "memory": (lambda: ab.Layout(micro_batch="auto", memory_bytes="1GB"), "memory_bytes is '1GB'"),
    "at most": (lambda: ab.Layout(micro_batch="auto", at_most=0), "at_most is 0"),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_of_wrong_parts_is_refused(kind):
    make, message = OBJECTIVES[kind]
    with pytest.raises(AnybatchError, match=message):
        update(objective=make())


def step_of(micro_batches):
    raise AssertionError("not reached")


OTHERS = {
    "decay": (lambda: ab.Average(linear(), "a"), "Average expects a decay .* got 'a'"),
    "decay and model": (lambda: ab.Average(0.9, linear()), "Average expects a decay"),
    "average of nothing": (lambda: ab.Average(None, 0.9), "model is None"),
    "average's state": (
        lambda: ab.Average(linear(), 0.9).load_state_dict({}),
        "none of an average",
    ),
    "folder": (lambda: ab.Run(3), "folder is 3. It must be the path"),
    "trackers": (lambda: ab.Run("never made", trackers=3), "trackers is 3"),
    "settings": (lambda: ab.Run("never made", settings=3), "settings is 3"),
    "group": (lambda: ab.Run("never made", group=3), "group is 3"),
    "start": (lambda: next(ab.batches((X, Y), ab.Order(12, batch_size=5), "a")), "start is 'a'"),
    "stop": (lambda: next(ab.batches((X, Y), ab.Order(12, batch_size=5), stop=1.5)), "stop is 1.5"),
    "step": (lambda: ab.assert_layout_invariant(None, (X, Y)), "training_step is of type NoneType"),
    "model for a step": (
        lambda: ab.assert_layout_invariant(linear(), X),
        "training_step is of type",
    ),
    "sizes": (
        lambda: ab.assert_layout_invariant(step_of, X, micro_batches=[1.5]),
        r"micro_batches is \[1\.5\]",
    ),
    "tolerance": (
        lambda: ab.assert_layout_invariant(step_of, X, tolerance="a"),
        "tolerance is 'a'",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_functions_refuse_arguments_of_the_wrong_type(kind):
    make, message = OTHERS[kind]
    with pytest.raises(AnybatchError, match=message):
        make()
