"""anybatch scale: what it prints, what it writes, what it refuses.

The numbers are those of the rules, written out; their tests are in test_scaling_*.py.
"""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from anybatch.recipe.files import find_recipe, read_recipe
from anybatch.recipe.scaling import rescale
from command_line import anybatch, refuse, run_command, write_module, write_recipe


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def state(**sections: Any) -> Path:
    return write_recipe(Path(), **sections)


def test_it_prints_the_new_recipe_with_the_table_as_its_head() -> None:
    out = run_command("scale", state(), "--batch-size", 512).out
    tree = tomllib.loads(out)
    assert (tree["batch"]["size"], tree["optimizer"]["lr"]) == (512, 1.0)
    assert "schedule" not in tree  # keys at their defaults are left out
    title, *rows = [line for line in out.splitlines() if line.startswith("# ")]
    assert title.split() == ["#", "key", "old", "new", "rule", "why"]
    assert rows[0].split()[:5] == ["#", "batch.size", "256", "512", "asked"]
    assert rows[1].split()[:5] == ["#", "optimizer.lr", "0.5", "1", "linear"]
    assert "k lr: one update in place of k (Goyal et al. 2017)" in rows[1]
    assert any(row.startswith("# Warning: warm-up needed:") for row in rows)


def test_what_it_prints_is_a_recipe_that_trains() -> None:
    Path("new.toml").write_text(run_command("scale", state(), "--batch-size", 128).out)
    assert run_command("train", "new.toml", "--out", "run", "--json").report["complete"] is True


def test_out_writes_it_shows_the_table_and_writes_over_nothing() -> None:
    result = run_command("scale", state(), "--batch-size", 512, "--out", "new.toml")
    assert "optimizer.lr" in result.out
    assert "Warning: warm-up needed" in result.out
    assert result.out.endswith("Written to new.toml. Train it: anybatch train new.toml\n")
    wanted = rescale(read_recipe(Path("recipe.toml")), batch_size=512).recipe
    assert read_recipe(Path("new.toml")) == wanted
    assert "exists and is not written over" in refuse(
        "scale", "recipe.toml", "--batch-size", 512, "--out", "new.toml"
    )


@pytest.mark.parametrize("name", ["lenet-digits", "goyal-digits", "caffe-lenet", "tf-cifar10"])
def test_a_shipped_recipe_is_read_back_as_it_was_carried(name: str) -> None:
    size = 2 * read_recipe(find_recipe(name)).batch.size
    run_command("scale", name, "--batch-size", size, "--out", "new.toml")
    assert (
        read_recipe(Path("new.toml"))
        == rescale(read_recipe(find_recipe(name)), batch_size=size).recipe
    )


def test_json_holds_the_changes_the_warnings_and_the_whole_recipe() -> None:
    result = run_command("scale", state(), "--batch-size", 512, "--json").report
    assert result["rule"] == "linear"
    assert result["changes"][1] == {
        "key": "optimizer.lr",
        "old": 0.5,
        "new": 1.0,
        "rule": "linear",
        "why": "k lr: one update in place of k (Goyal et al. 2017)",
    }
    assert result["warnings"][0].startswith("warm-up needed")
    assert result["recipe"]["optimizer"]["lr"] == 1.0
    with_file = run_command("scale", "recipe.toml", "--batch-size", 9, "--json", "--out", "x.toml")
    assert with_file.report["file"] == "x.toml"


def test_another_rule_is_taken_by_name() -> None:
    result = run_command("scale", state(), "--batch-size", 1024, "--rule", "sqrt", "--json").report
    assert (result["rule"], result["recipe"]["optimizer"]["lr"]) == ("sqrt", 1.0)


def test_it_converts_alone_or_before_it_carries() -> None:
    result = run_command("scale", state(), "--reduction", "sum", "--json").report
    assert (result["rule"], result["recipe"]["objective"]["reduction"]) == ("sum", "sum")
    assert result["recipe"]["optimizer"]["lr"] == 0.5 / 256
    both = run_command(
        "scale", "recipe.toml", "--reduction=sum", "--batch-size=512", "--json"
    ).report
    assert both["recipe"]["optimizer"]["lr"] == 0.5 / 256  # one fixed rate
    assert [change["key"] for change in both["changes"]] == [
        "objective.reduction",
        "optimizer.lr",
        "batch.size",
    ]


def test_a_key_can_be_set_before_it_is_carried() -> None:
    sets = ["schedule.warm_up=1000", "schedule.warm_up_start=0.5"]
    result = run_command(
        "scale", state(), "--batch-size", 512, *(f"--set={s}" for s in sets), "--json"
    ).report
    assert result["recipe"]["schedule"]["warm_up_start"] == 0.5
    assert not any("warm-up" in warning for warning in result["warnings"])


def test_a_model_with_batch_normalisation_gets_its_grain_and_a_word_on_its_momentum() -> None:
    state(model={"name": "resnet_small", "args": {"channels": 1, "width": 2}})
    result = run_command("scale", "recipe.toml", "--batch-size", 512, "--json").report
    assert result["recipe"]["objective"]["grain"] == 256
    messages = [w for w in result["warnings"] if "momentum of batch normalisation" in w]
    assert "batch.reference_size = 256 and batch.size = 512" in messages[0]
    plain = run_command("scale", "lenet-digits", "--batch-size", 512, "--json").report
    assert not [w for w in plain["warnings"] if "normalisation" in w]


def test_a_model_that_cannot_be_built_here_is_no_obstacle() -> None:
    state(model={"name": "pretrained", "args": {"folder": "nowhere", "kind": "causal"}})
    result = run_command("scale", "recipe.toml", "--batch-size", 512, "--json").report
    assert result["recipe"]["optimizer"]["lr"] == 1.0
    assert any("the model cannot be built here" in warning for warning in result["warnings"])


def test_code_of_the_users_is_imported_as_for_training() -> None:
    write_module(
        Path.cwd(),
        "scaled_model",
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))\n",
    )
    state(model={"name": "scaled_model:net"})
    result = run_command("scale", "recipe.toml", "--batch-size", 512, "--json").report
    assert result["recipe"]["objective"]["grain"] == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 0], "batch_size = 0. Expected the number of examples of an update"),
        (["--batch-size", -8], "batch_size = -8. Expected"),
        (["--batch-size", 8, "--rule", "square"], "there is no rule 'square'"),
        (["--reduction", "median"], "reduction = 'median'. Expected 'sum' or 'mean'"),
        ([], "nothing to do. Set --batch-size N, --reduction sum or mean, or both"),
        (["--batch-size", 8, "--out", "no/where.toml"], "no is no folder"),
        (["--batch-size", 8, "--set", "optimizer.name=nadam"], "'nadam' has no rule that is known"),
        (["--batch-size", 8, "--set", "optimizer.name=my:opt"], "'my:opt' is code of yours"),
        (["--batch-size", 8, "--set", "objective.reduction=max"], "'max' is another objective"),
        (["--reduction", "sum", "--set", "optimizer.name=nadam"], "'nadam': nobody knows"),
        (
            [
                "--batch-size",
                8,
                "--rule",
                "half-life",
                "--set",
                "optimizer.name=adam",
            ],
            "half-life is a rule for the momentum of sgd",
        ),
    ],
)
def test_a_mistake_ends_in_one_message(options: list[object], message: str) -> None:
    assert message in refuse("scale", state(), *options)
    result = anybatch("scale", "recipe.toml", *options, "--json").report
    assert result["ok"] is False
    assert message in result["error"]


def test_a_size_that_is_no_number_is_refused() -> None:
    ended = anybatch("scale", state(), "--batch-size", "many")
    assert (ended.code, ended.out) == (2, "")
    assert "--batch-size" in ended.err
    assert "Traceback" not in ended.err


def test_a_recipe_that_is_not_there_is_refused() -> None:
    assert "there is no recipe 'lenet-digit'" in refuse("scale", "lenet-digit", "--batch-size", 9)
