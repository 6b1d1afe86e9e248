"""Recipes as files: what is accepted, what is told of mistakes, what is kept and compared."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import RecipeError
from anybatch.recipe.files import (
    FREE,
    change_recipe,
    find_recipe,
    fingerprint_recipe,
    format_recipe,
    parse_recipe,
    read_recipe,
)
from command_line import RECIPE, recipe, write_recipe
from properties import seeded_examples

CHANGED: dict[str, Any] = {  # another value for each key
    "model.name": "mlp",
    "model.args": {"classes": 11},
    "model.weights": "model.safetensors",
    "data.name": "npz",
    "data.args": {"path": "x"},
    "data.held_out": 0.3,
    "data.validation": 0.1,
    "data.stratify": False,
    "data.split": 1,
    "data.workers": 2,
    "objective.loss": "squared_error",
    "objective.reduction": "sum",
    "objective.penalty": [{"kind": "L2", "strength": 0.1}],
    "objective.grain": 8,
    "optimizer.name": "adam",
    "optimizer.lr": 0.25,
    "optimizer.args": {"momentum": 0.9},
    "optimizer.groups": [{"on": ["*bias"], "lr_factor": 2.0, "momentum": 0.5}],
    "optimizer.clip_norm": 1.0,
    "optimizer.clip_examples": 1.0,
    "schedule.name": "step",
    "schedule.factor": 0.5,
    "schedule.every": 100,
    "schedule.at": [100, 200],
    "schedule.gamma": 0.5,
    "schedule.power": 0.5,
    "schedule.staircase": True,
    "schedule.examples": 90,
    "schedule.end": 0.1,
    "schedule.warm_up": 50,
    "schedule.warm_up_start": 0.01,
    "average.decay": 0.9,
    "average.warm_up": True,
    "observe.projections": 64,
    "observe.norms": True,
    "observe.alignment": True,
    "observe.share": True,
    "spikes.window": 50,
    "spikes.factor": 6.0,
    "batch.size": 128,
    "batch.last": "carry",
    "batch.micro_batch": 32,
    "batch.reference_size": 64,
    "batch.scaling": "sqrt",
    "order.name": "weighted",
    "order.args": {"window": 10},
    "run.epochs": 9,
    "run.seed": 1,
    "run.kernels": "fastest",
    "run.dtype": "float64",
    "run.precision": "bfloat16",
    "run.device": "cuda",
    "run.threads": 2,
    "run.bitwise": True,
    "run.shard": True,
    "run.checkpoint_every": 5,
    "run.keep": 3,
    "run.compare_every": 7,
    "run.self_check": False,
    "run.compile": "auto",
    "stop.metric": "loss",
    "stop.better": "higher",
    "stop.target": 0.9,
    "stop.patience": 4,
    "track.to": ["tensorboard"],
    "track.smoothing": 0.5,
}
INVERSE = {"schedule.name": "inverse", "schedule.gamma": 0.1} | {
    "schedule.power": 0.75,
    "schedule.every": 64,
}
COSINE = {"schedule.name": "cosine", "schedule.examples": 100}
STOP = {"stop.metric": "accuracy", "stop.target": 0.8}
NEEDS = {  # what a key means nothing without
    "schedule.name": {"schedule.every": 50},
    "schedule.factor": {"schedule.name": "step", "schedule.every": 50},
    "schedule.every": {"schedule.name": "step", "schedule.every": 50},
    "schedule.at": {"schedule.name": "step", "schedule.at": [50]},
    "schedule.gamma": INVERSE,
    "schedule.power": INVERSE,
    "schedule.staircase": {"schedule.name": "exponential", "schedule.every": 50},
    "schedule.examples": COSINE,
    "schedule.end": COSINE,
    "schedule.warm_up_start": {"schedule.warm_up": 50},
    "average.warm_up": {"average.decay": 0.5},
    "spikes.factor": {"spikes.window": 100},
    "batch.scaling": {"batch.reference_size": 64},
    "run.bitwise": {"run.threads": 1},
    "stop.metric": STOP,
    "stop.better": STOP,
    "stop.target": STOP,
    "stop.patience": STOP,
}


def test_a_key_at_its_default_changes_no_fingerprint() -> None:
    stated = recipe(**{"schedule.name": "constant", "observe.norms": False, "track.to": []})
    assert fingerprint_recipe(stated) == fingerprint_recipe(recipe())
    assert fingerprint_recipe(recipe(**{"observe.norms": True})) != fingerprint_recipe(
        recipe()
    )  # the control


def test_there_is_another_value_for_every_key_of_a_recipe() -> None:
    keys = {f"{s}.{k}" for s, keys in recipe().model_dump().items() for k in keys}
    assert keys == set(CHANGED)


@pytest.mark.parametrize("key", CHANGED)
def test_the_fingerprint_changes_with_the_keys_that_matter_and_with_no_free_one(key: str) -> None:
    needed = NEEDS.get(key, {})
    before = {} if key == "schedule.name" else needed
    old, new = recipe(**before), recipe(**needed | {key: CHANGED[key]})
    assert old != new
    assert (fingerprint_recipe(old) == fingerprint_recipe(new)) == (key in FREE)


@pytest.mark.parametrize("key", CHANGED)
def test_only_free_keys_can_change_on_resume(key: str) -> None:
    before = recipe(**{} if key == "schedule.name" else NEEDS.get(key, {}))
    value = CHANGED[key]
    text = str(value).replace("{'", "{").replace("':", " =") if isinstance(value, dict) else value
    if key == "objective.penalty":
        text = "[{kind = 'L2', strength = 0.1}]"
    if key == "optimizer.groups":
        text = "[{on = ['*bias'], lr_factor = 2.0}]"
    text = str(text).lower() if isinstance(value, bool) else text
    needed = [f"{name}={v}" for name, v in NEEDS[key].items()] if key == "schedule.name" else []
    if key in FREE:
        after = recipe(**NEEDS.get(key, {}) | {key: value})
        assert change_recipe(before, [f"{key}={text}"]) == after
    else:
        with pytest.raises(RecipeError, match=r"cannot become .* it changes the arithmetic"):
            change_recipe(before, [*needed, f"{key}={text}"])


@pytest.mark.parametrize("key", CHANGED)
def test_a_resolved_recipe_is_read_back_as_it_was(key: str, tmp_path: Path) -> None:
    before = recipe(**NEEDS.get(key, {}) | {key: CHANGED[key]})
    (tmp_path / "recipe.toml").write_text(format_recipe(before))
    after = read_recipe(tmp_path / "recipe.toml")
    assert after == before
    assert format_recipe(after) == format_recipe(before)
    assert fingerprint_recipe(after) == fingerprint_recipe(before)


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.dates(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab.'\" ="), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc"), VALUES))
@seeded_examples(100)
def test_arguments_of_any_kind_are_read_back_as_they_were(args: dict[str, Any]) -> None:
    before = recipe(**{"model.args": args})
    after = parse_recipe(tomllib.loads(format_recipe(before)), "a test")
    assert after == before
    assert fingerprint_recipe(after) == fingerprint_recipe(before)


def test_dotted_keys_and_nested_ones_have_fingerprints_of_their_own() -> None:
    nested, dotted = {"a": {"b": 1}}, {"a.b": 1}
    a, b = (fingerprint_recipe(recipe(**{"model.args": args})) for args in (nested, dotted))
    assert a != b


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.epochs", "3", "run.epochs: expected an integer, got '3'."),
        ("run.epochs", 3.0, "run.epochs: expected an integer, got 3.0."),
        ("run.epochs", True, "run.epochs: expected an integer, got True."),
        ("run.epochs", 0, "run.epochs: expected at least 1, got 0."),
        ("run.keep", 1, "run.keep: expected at least 2, got 1."),
        ("run.dtype", "float23", "got 'float23'; did you mean 'float32'?"),
        ("run.threads", [1], r"run.threads: expected an integer, got \[1\]."),
        ("optimizer.lr", "0.1", "optimizer.lr: expected a number, got '0.1'."),
        ("optimizer.lr", float("inf"), "optimizer.lr: expected a finite number, got inf."),
        ("optimizer.lr", float("nan"), "optimizer.lr: expected a finite number, got nan."),
        ("optimizer.name", 3, "optimizer.name: expected a string, got 3."),
        ("data.held_out", 1, "data.held_out: expected a number below 1 or a table .*, got 1."),
        ("data.validation", 1, "data.validation: expected a number below 1, got 1."),
        ("track.to", ["tensorbord"], "track.to.0: .* got 'tensorbord'; did you mean 'tensorboard'"),
        ("data.stratify", "yes", "data.stratify: expected true or false, got 'yes'."),
        ("model.args", [1], r"model.args: expected a table \{key = value\}, got \[1\]."),
        ("model.name", 3, "model.name: expected a string, got 3."),
        ("objective.reduction", 3, r"expected a string or a table \{key = value\}, got 3."),
        ("objective.penalty", {"kind": "L2"}, "objective.penalty: expected a list"),
        (
            "objective.penalty",
            [{"kind": "L3", "strength": 1.0}],
            "penalty.0.kind: expected 'L1' or 'L2', got 'L3'",
        ),
        ("objective.penalty", [{"kind": "L2"}], "penalty.0.strength: missing"),
        (
            "objective.penalty",
            [{"kind": "L2", "strength": 1.0, "onn": ["*"]}],
            "penalty.0.onn: no such key; did you mean 'on'",
        ),
        ("batch.micro_batch", "aut", "expected an integer or 'auto', got 'aut'; did you mean"),
        ("batch.lst", "keep", "batch.lst: no such key; did you mean 'last'?"),
        ("schedule.xyz", 1, "schedule.xyz: no such key; expected one of: at, end, every"),
        ("schedule.at", [1, 2.5], "schedule.at.1: expected an integer, got 2.5."),
        ("schedule.at", [100], "'constant' does not use at. Set name = 'step', or leave out at"),
        ("schedule.factor", 0.5, "use factor. Set name = 'step' or 'exponential', or leave"),
        ("schedule.name", "inverse", "schedule: 'inverse' needs gamma, power, every too."),
        ("schedule.name", "exponential", "schedule: 'exponential' needs every too."),
        ("schedule.name", "cosine", "schedule: 'cosine' needs examples too."),
        ("schedule.name", "cosin", "got 'cosin'; did you mean 'cosine'"),
        ("optimizer.groups", [{"lr_factor": 2.0}], "optimizer.groups.0.on: missing"),
        ("optimizer.groups", [{"on": "*"}], r"groups.0.on: expected a list, got '\*'"),
        ("optimizer.groups", [{"on": ["*"], "lr_factor": -1}], "lr_factor: expected at least 0"),
        ("average.decay", 1.0, "average.decay: expected a number below 1, got 1.0."),
        ("average.warm_up", True, "average: warm_up needs decay, such as 0.999."),
        ("batch.reference_size", 0, "batch.reference_size: expected at least 1, got 0."),
        ("batch.scaling", "square", "batch.scaling: expected 'auto', .* got 'square'"),
        ("batch.scaling", "sqrt", "batch: scaling needs reference_size = the batch size"),
        ("stop.metric", "loss", "stop: metric needs target = value, patience = epochs, or both"),
        ("stop.target", 0.9, "stop: target and patience need metric = 'loss'"),
        ("stop.patience", 0, "stop.patience: expected at least 1, got 0."),
        ("schedule.name", "step", "schedule: 'step' needs either every = examples or at"),
        ("schedule.warm_up_start", 0.1, "schedule: warm_up_start needs warm_up = examples"),
    ],
)
def test_a_mistake_is_named_by_its_place(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**{key: value})


def test_every_mistake_of_a_recipe_is_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"a test is no valid recipe:\n  .*\n  .*\n  .*\Z"):
        recipe(**{"run.epochs": "3", "optimizer.lr": -1, "batchh.size": 3})


def test_a_section_that_is_missing_or_no_section_is_named() -> None:
    without = {name: keys for name, keys in RECIPE.items() if name != "optimizer"}
    with pytest.raises(RecipeError, match=r"optimizer: missing\. Every recipe needs it"):
        parse_recipe(without, "a test")
    with pytest.raises(RecipeError, match=r"run: expected a section \[...\], got 3"):
        parse_recipe(RECIPE | {"run": 3}, "a test")


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("run.epochs=3", ("run", "epochs"), 3),
        (" run.epochs = 3 ", ("run", "epochs"), 3),
        ("optimizer.lr=1e-3", ("optimizer", "lr"), 0.001),
        ("optimizer.lr=1", ("optimizer", "lr"), 1.0),
        ("model.name=mlp", ("model", "name"), "mlp"),
        ('model.name="mlp"', ("model", "name"), "mlp"),
        ("model.name=my.module:net", ("model", "name"), "my.module:net"),
        ("data.args.path=/a/b=c.npz", ("data", "args"), {"path": "/a/b=c.npz"}),
        ("model.args.hidden=[32, 16]", ("model", "args"), {"hidden": [32, 16]}),
        ("model.args={classes = 3}", ("model", "args"), {"classes": 3}),
        ("data.stratify=false", ("data", "stratify"), False),
        ("batch.micro_batch=auto", ("batch", "micro_batch"), "auto"),
        ("objective.reduction={name = 'tilted', t = 2.0}", ("objective", "reduction"), None),
        ("objective.penalty=[]", ("objective", "penalty"), []),
    ],
)
def test_a_key_is_set_by_name(
    change: str, key: tuple[str, str], value: Any, tmp_path: Path
) -> None:
    result = read_recipe(write_recipe(tmp_path), [change]).model_dump()[key[0]][key[1]]
    assert result == ({"name": "tilted", "t": 2.0} if value is None else value)


def test_the_last_of_two_changes_holds(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert read_recipe(path, ["run.epochs=3", "run.epochs=4"]).run.epochs == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.epochs", "expected --set section.key=value, got 'run.epochs'"),
        ("epochs=3", "expected --set section.key=value, got 'epochs=3'"),
        ("=3", "expected --set section.key=value, got '=3'"),
        ("run.=3", "expected --set section.key=value, got 'run.=3'"),
        ("run.epochs=", "run.epochs: expected an integer, got ''"),
        ("run.epochs=many", "run.epochs: expected an integer, got 'many'"),
        ("run.epochs.x=3", "epochs is a value. Expected a section or table"),
        ("objective.penalty.0.strength=3", "A list is set as a whole"),
        ("runs.epochs=3", "runs: no such key; did you mean 'run'?"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, objective={"penalty": [{"kind": "L2", "strength": 0.1}]})
    path.write_text(path.read_text().replace('{"kind": "L2"', '{kind = "L2"'))
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        read_recipe(path, [change])


def test_a_shipped_recipe_is_found_by_name_and_a_file_by_its_path(tmp_path: Path) -> None:
    assert find_recipe("lenet-digits").name == "lenet-digits.toml"
    path = write_recipe(tmp_path)
    assert find_recipe(str(path)) == path
    with pytest.raises(RecipeError, match=r"there is no recipe 'lenet_digits'.* did you mean"):
        find_recipe("lenet_digits")


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "step": {"every": 50},
    "inverse": {"gamma": 0.1, "power": 0.75, "every": 64},
    "exponential": {"every": 50},
    "cosine": {"examples": 100},
}
USES = {
    "factor": {"step", "exponential"},
    "every": {"step", "inverse", "exponential"},
    "gamma": {"inverse"},
    "power": {"inverse"},
    "staircase": {"exponential"},
    "examples": {"cosine"},
    "end": {"cosine"},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("key", USES)
def test_a_key_that_the_schedule_does_not_use_is_refused(name: str, key: str) -> None:
    stated = {"name": name} | SCHEDULES[name] | {key: CHANGED[f"schedule.{key}"]}
    keys = {f"schedule.{key}": value for key, value in stated.items()}
    if name in USES[key]:
        assert getattr(recipe(**keys).schedule, key) == CHANGED[f"schedule.{key}"]
    else:
        with pytest.raises(RecipeError, match=f"schedule: '{name}' does not use {key}. Set"):
            recipe(**keys)
