"""Settings are compared on resume, and the one that differs is named."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import CheckpointError, RunError
from anybatch.runs.settings import collect_settings, compare_settings, describe
from small_training import OBJECTIVE, SCHEDULE, Average, start, train_small


def left(folder, **options):
    """A run with one checkpoint, not at its end."""
    for step in start().loop(folder, **options):
        step.save()
        break


def other_losses(model, batch):
    return OBJECTIVE.example_losses(model, batch)


def with_optimizer(kind, **hyper):
    training = start()
    groups = training.optimizer.param_groups
    groups = [{"params": group["params"], "lr": group["lr"]} for group in groups]
    training.optimizer = kind(groups, **{"lr": 0.1, **hyper})
    return training


def of_width(width):
    training = start()
    model = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
    training.model, training.average = model, Average(model)
    training.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return training


def with_swapped_parameters():
    training = start()
    parameters = training.optimizer.param_groups[0]["params"]
    parameters[:2] = parameters[1::-1]
    return training


def with_frozen():
    training = start()
    training.model[0].bias.requires_grad_(False)
    return training


@pytest.mark.fast(3)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 8}, r"order = .*seed=7.* with .*seed=8"),
        ({"last": "drop"}, r"order = .*last='keep'.* with .*last='drop'"),
        ({"objective": replace(OBJECTIVE, grain=8)}, "grain = 4, .* with 8"),
        ({"objective": replace(OBJECTIVE, penalty=None)}, r"penalty = \['L2.* with \[\]"),
        ({"objective": replace(OBJECTIVE, penalty=ab.L2(0.02))}, r"penalty\[0\] = .*0.01.*0.02"),
        (
            {"objective": replace(OBJECTIVE, reduction=ab.GroupDRO(0.25))},
            r"reduction.data = 'GroupDRO\(eta=0.5\)', .* with 'GroupDRO\(eta=0.25\)'",
        ),
        (
            {"objective": replace(OBJECTIVE, example_losses=other_losses)},
            "example_losses = '<function example_losses>', .* with '<function other_losses>'",
        ),
        ({"clip": ab.ClipNorm(2.0)}, r"clip = 'ClipNorm\(max_norm=1.0\)', .*2.0"),
        ({"clip": None}, r"clip = 'ClipNorm\(max_norm=1.0\)', .* with None"),
        ({"schedule": None}, r"schedule = 'WarmUp\(.* with None"),
        ({"schedule": replace(SCHEDULE, examples=11)}, "schedule = .*examples=10.*examples=11"),
        ({"transform": None}, "transform = '<function noisy>', .* with None"),
        ({"collate": torch.utils.data.default_collate}, "collate = None, .*default_collate"),
    ],
)
def test_an_argument_that_differs_is_named(tmp_path, options, named):
    left(tmp_path)
    for _ in range(2):  # the error leaves no lock behind
        with pytest.raises(RunError, match=f"was begun with {named}.* Restore the setting"):
            train_small(tmp_path, **options)
    train_small(tmp_path)  # control: as it was


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            partial(with_optimizer, torch.optim.SGD, momentum=0.8),
            r"optimizer.groups\[0\].momentum = 0.9, .* with 0.8",
        ),
        (partial(with_optimizer, torch.optim.Adam), "optimizer.class = 'SGD', .* with 'Adam'"),
        (
            partial(with_optimizer, torch.optim.SGD, momentum=0.9, nesterov=True),
            r"optimizer.groups\[0\].nesterov = False, .* with True",
        ),
        (partial(of_width, 9), r"model.0.bias\[1\] = 8, .* with 9"),
        (with_frozen, r"model.0.bias\[2\] = 'trained', .* with 'frozen'"),
        (with_swapped_parameters, r"optimizer.groups\[0\].params\[0\] = '0.weight', .* '1.weight'"),
    ],
)
def test_a_model_or_optimiser_that_differs_is_named(tmp_path, change, named):
    left(tmp_path)
    with pytest.raises(RunError, match=f"was begun with {named}"):
        list(change().loop(tmp_path))
    list(start().loop(tmp_path))  # control: as it was


def test_settings_of_the_users_own_are_compared_and_may_not_hide_the_loops(tmp_path):
    left(ab.Run(tmp_path, settings={"data": {"version": 3}}))
    with pytest.raises(RunError, match=r"data.version = 3, .* with 4"):
        train_small(ab.Run(tmp_path, settings={"data": {"version": 4}}))
    with pytest.raises(RunError, match=r"data = {'version': 3}, .* with None"):
        train_small(tmp_path)
    with pytest.raises(RunError, match=r"\['order'\], names that the loop itself compares"):
        train_small(ab.Run(tmp_path / "new", settings={"order": 1}))
    with pytest.raises(CheckpointError, match="Use lists in place of tuples"):
        ab.Run(tmp_path / "new", settings={"sizes": (1, 2)})


def test_epochs_layout_and_checkpoints_may_change(tmp_path):
    expected = train_small(epochs=4)
    left(tmp_path)
    changed = ab.Run(tmp_path, checkpoint_every=2, keep=3)
    resumed = train_small(changed, epochs=4, layout=ab.Layout(micro_batch=4))
    assert resumed.losses == expected.losses[1:]


def test_an_order_that_does_not_print_itself_is_told_by_its_first_batch():
    class OrderOfOnesOwn:
        seed = 0

        def __init__(self, size):
            self.size = size

        def indices(self, step):
            return torch.arange(self.size)

    training = start()
    first, second = (
        collect_settings(training.model, OBJECTIVE, training.optimizer, OrderOfOnesOwn(size))
        for size in (4, 5)
    )
    assert first["order"] == second["order"]
    with pytest.raises(RunError, match="begun with order_begins = "):
        compare_settings("run", first, second)


def test_descriptions_tell_values_apart_and_are_the_same_in_every_process():
    def by(weight):
        return weight

    distinct = [
        None,
        True,
        0.1,
        float("inf"),
        float("nan"),
        "0.1",
        [1, 2],
        {"a": 1},
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.float64) + 1e-12,
        torch.zeros(2000),
        torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1e-9),
        torch.zeros(2000).numpy(),
        partial(by, weight=1),
        partial(by, weight=2),
        by,
        F.relu,
        ab.Tilted(0.1),
        object(),
    ]
    texts = [json.dumps(describe(thing), allow_nan=False) for thing in distinct]
    assert len(set(texts)) == len(distinct)
    assert not any("0x" in text for text in texts)
    assert str(torch.zeros(2000)) == str(distinct[11])  # control: printing would not tell


PRINTING = """
import dataclasses, functools, json, sys
from anybatch.runs.settings import describe

names = [f"name {i}" for i in range(20)]
padding = [object() for _ in range(int(sys.argv[1]))]  # other addresses


@dataclasses.dataclass
class Choice:
    names: set
    inner: object = None


class Plain:
    pass


class WithId:
    def __repr__(self):
        return f"<WithId {id(self)} {hex(id(self))}>"


def f(x, names):
    return x


things = [
    set(names),
    frozenset(names),
    {"a": set(names)},
    {frozenset(names): 1},
    [({1, "a", None, (2, "b")},)],
    Choice(set(names), Choice(frozenset(names), Plain())),
    functools.partial(f, names=set(names)),
    f,
    lambda x: x,
    Plain().__repr__,
    WithId(),
    [WithId(), {"a": Plain()}],
]
print(json.dumps([describe(thing) for thing in things]))
print(json.dumps([str(names_as_set) for names_as_set in [set(names)]]))  # the control
"""


@pytest.mark.slow
def test_what_settings_say_does_not_depend_on_the_process():
    texts_seen, controls = set(), set()
    for seed in (1, 2, 3):
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", PRINTING, str(1000 * seed)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        described, control = ran.stdout.splitlines()
        texts_seen.add(described)
        controls.add(control)
    assert len(texts_seen) == 1
    assert len(controls) == 3


def test_values_print_as_repr_prints_them():
    """Oracle: `repr`, for what it prints the same everywhere. So older runs can be continued."""

    @dataclass
    class Pair:
        left: object
        right: object = None

    for thing in (
        *({1}, set(), frozenset({1}), Pair((1,)), Pair(()), Pair(1, [2.5, ("b",)]), Pair({3})),
        *(Pair({"a": (1,)}), ab.Mean(), 0.1 * ab.Mean(), ab.Observe(norms=True), ab.L2(0.1)),
    ):
        assert describe(thing) == repr(thing)
