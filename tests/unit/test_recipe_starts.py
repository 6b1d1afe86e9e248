"""Starts of a run: weights of a file, models of a Transformers folder, any optimiser."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anybatch import zoo
from anybatch.batch import Padded
from anybatch.errors import ModelError, RecipeError
from anybatch.recipe.build import Setup, build
from anybatch.recipe.optimizers import OPTIMIZERS
from anybatch.runs.records import read_records
from command_line import recipe, refuse, run_command, write_module, write_recipe


def make_setup(*, allow_code: bool = False, **keys: Any) -> Setup:
    return build(recipe(**keys), allow_code=allow_code)


def save_weights(path: Path, **changes: torch.Tensor | None) -> str:
    """Weights of a softmax regression, some changed or left out."""
    tensors = {"1.weight": torch.full((10, 64), 0.25), "1.bias": torch.arange(10.0)} | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    return str(path)


def test_a_model_starts_from_a_file_or_a_folder_with_one(tmp_path):
    file = save_weights(tmp_path / "model.safetensors")
    for path in (file, str(tmp_path)):
        result = make_setup(**{"model.weights": path})
        weight, bias = (p.detach() for p in result.model.parameters())
        assert torch.equal(weight, torch.full((10, 64), 0.25))
        assert torch.equal(bias, torch.arange(10.0))
        assert result.weights_sha256 == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    ours = next(iter(make_setup().model.parameters()))
    assert not torch.equal(ours, weight)  # the control


def test_an_exported_run_can_be_started_from_and_goes_on_without_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_command("train", write_recipe(tmp_path), "--json").report
    run_command("export", first["run"], "--out", "start.safetensors", "--json")
    path = write_recipe(tmp_path, model={"weights": "start.safetensors"}, optimizer={"lr": 1e-9})
    second = run_command("train", path, "--json").report
    assert second["held_out"]["loss"] == pytest.approx(first["held_out"]["loss"], rel=1e-5)
    sessions = read_records(Path(second["run"]) / "records.jsonl")
    messages = [row["weights"] for row in sessions if "weights" in row and row["kind"] == "session"]
    digest = hashlib.sha256(Path("start.safetensors").read_bytes()).hexdigest()
    assert messages == [{"file": "start.safetensors", "sha256": digest}]
    Path("start.safetensors").unlink()
    on = run_command("resume", second["run"], "--set", "run.epochs=2", "--json").report
    assert on["complete"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1.bias": None}, "lacks 1.bias. Expected all of the model's weights"),
        (
            {"1.bias": torch.zeros(9)},
            r"1.bias of shape \(9,\). The model has 1.bias of shape \(1",
        ),
        ({"2.bias": torch.zeros(9)}, r"2.bias of shape \(9,\). The model has no such tensor"),
    ],
)
def test_weights_of_another_model_are_refused(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        make_setup(**{"model.weights": save_weights(tmp_path / "w.safetensors", **changes)})


def test_a_file_that_is_missing_or_damaged_is_refused_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, model={"weights": "none.safetensors"})
    assert "none.safetensors is no file. Expected weights" in refuse("train", path)
    Path("none.safetensors").write_bytes(b"\x80\x02pickle")
    assert "is no readable safetensors file" in refuse("train", path)
    assert not Path("runs").exists()


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 3, bias=False)
            self.second = torch.nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    from anybatch.recipe.models import load_weights

    save_file({"first.weight": torch.eye(3)}, tmp_path / "tied.safetensors")
    model = Tied()
    load_weights(model, str(tmp_path / "tied.safetensors"))
    assert torch.equal(model.second.weight, torch.eye(3))


def test_a_transformers_folder_trains_as_a_classifier_and_as_a_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30, intermediate_size=16, num_labels=3, **small)
    torch.manual_seed(0)
    original = transformers.BertForSequenceClassification(config).eval()
    original.save_pretrained(tmp_path / "bert")
    model = zoo.pretrained(str(tmp_path / "bert")).eval()
    tokens, mask = torch.randint(30, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = original(input_ids=tokens, attention_mask=mask).logits
    assert torch.equal(model(Padded(tokens, mask.bool())), expected)
    assert not torch.equal(model(tokens), expected)  # the control: the mask matters
    head = zoo.pretrained(str(tmp_path / "bert"), kind="AutoModelForMaskedLM")
    assert head(tokens).shape == (2, 5, 30)


def test_a_folder_that_is_none_and_a_kind_that_is_none_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json\. Expected a folder that save_pret"):
        zoo.pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="transformers has no model 'AutoModelForNothing'"):
        zoo.pretrained(str(tmp_path), kind="AutoModelForNothing")


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon"}))  # it takes matrices alone
def test_every_optimiser_makes_an_update(name: str) -> None:
    result = make_setup(**{"optimizer.name": name, "optimizer.lr": 0.01})
    before = [p.detach().clone() for p in result.model.parameters()]
    for p in result.model.parameters():
        p.grad = torch.ones_like(p)
    result.optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, result.model.parameters(), strict=True)]
    assert all(moved)


def test_an_optimiser_that_does_not_fit_is_refused_with_its_own_words():
    with pytest.raises(RecipeError, match="Muon only supports 2D parameters"):
        make_setup(**{"optimizer.name": "muon"})


def test_the_optimisers_that_the_mission_names_are_there():
    assert {"sgd", "adagrad", "rmsprop", "adam", "adamw"} <= set(OPTIMIZERS)
    assert not {"lbfgs", "sparseadam", "optimizer"} & set(OPTIMIZERS)


MINE = """
import torch
made = []
def slow(params, lr, factor=0.5):
    made.append(lr)
    return torch.optim.SGD(params, lr=lr * factor)
def nothing(params, lr):
    return None
"""


def test_an_optimiser_can_be_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "optimisers_of_mine", MINE)
    name = "optimisers_of_mine:slow"
    keys = {"optimizer.name": name, "optimizer.lr": 0.8, "optimizer.args": {"factor": 0.25}}
    result = make_setup(allow_code=True, **keys)
    assert result.optimizer.param_groups[0]["lr"] == 0.2
    assert sys.modules["optimisers_of_mine"].made == [0.8]  # once: it may leave hooks in the model
    with pytest.raises(RecipeError, match="It is imported only if you say so"):
        make_setup(**keys)
    with pytest.raises(RecipeError, match=r"made a NoneType. Expected a torch\.optim"):
        make_setup(allow_code=True, **{"optimizer.name": "optimisers_of_mine:nothing"})
