"""Models, losses, reductions and data of the user's own: how they run, fail, and are kept out."""

import sys
from pathlib import Path

import pytest
import torch

from command_line import anybatch, refuse, run_command, write_module, write_recipe

GOOD = """
import torch
import torch.nn.functional as F
from torch import nn
import anybatch as ab
from anybatch.reductions import Reduced, Reduction

def data(shift=0):
    x = torch.randn(60, 4)  # drawn: the same in every session all the same
    return x, (x[:, 0] > 0).int() + shift

def net(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.2), nn.Linear(width, 2))

def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def two_terms(model, batch):
    out = model(batch[0])
    return {"fit": F.cross_entropy(out, batch[1], reduction="none"), "size": out.square().mean(1)}

def worst(losses, power=2.0):
    return (losses.values ** power).mean()

class Halved(Reduction):
    def __init__(self, by=2):
        self.by = by

    def _reduce(self, losses, state):
        return Reduced(losses.values.sum() / self.by, torch.full_like(losses.values, 1 / self.by))
"""

OWN: dict[str, dict[str, object]] = {
    "model": {"name": "mine:net"},
    "data": {"name": "mine:data"},
    "objective": {"loss": "mine:losses"},
    "batch": {"size": 16},
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def train(**sections: dict[str, object]) -> str:
    """Train on code of one's own; the digest."""
    write_module(Path.cwd(), "mine", GOOD)
    names = [path.name for path in Path().glob("run-*")]
    run = f"run-{len(names)}"
    run_command("train", write_recipe(Path(), **OWN | sections), "--out", run)
    return str(run_command("verify", run, "--json").report["digest"])


def test_a_model_a_loss_and_data_of_ones_own_train_and_resume_to_the_same_digest() -> None:
    whole = train(run={"epochs": 3})
    train(run={"epochs": 1})
    run_command("resume", "run-1", "--allow-code", "--set", "run.epochs=3")
    assert run_command("verify", "run-1", "--json").report["digest"] == whole
    assert run_command("evaluate", "run-1", "--allow-code", "--json").report["num_examples"] == 12
    rows = run_command("predict", "run-1", "--allow-code", "--json").report["predictions"]
    assert len(rows[0]["outputs"]) == 2
    assert run_command("export", "run-1", "--allow-code", "--json").report["tensors"] == 4


@pytest.mark.parametrize("command", ["resume", "evaluate", "predict", "export"])
def test_the_code_that_a_run_names_is_not_imported_unless_one_says_so(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train()
    write_module(Path.cwd(), "mine", "open('imported', 'w').close()\n" + GOOD)
    monkeypatch.delitem(sys.modules, "mine")
    assert "repeat with --allow-code" in refuse(command, "run-0")
    assert not Path("imported").exists()
    assert anybatch(command, "run-0", "--allow-code").code == 0  # control: now it is
    assert Path("imported").exists()


def test_a_recipe_inside_a_run_names_code_that_is_not_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train()
    write_module(Path.cwd(), "mine", "open('imported', 'w').close()\n" + GOOD)
    monkeypatch.delitem(sys.modules, "mine")
    deeper = Path("run-0/copies/recipe.toml")
    deeper.parent.mkdir()
    deeper.write_bytes(Path("run-0/recipe.toml").read_bytes())
    Path("link.toml").symlink_to("run-0/recipe.toml")
    for recipe in ("run-0/recipe.toml", deeper, "link.toml"):
        assert "repeat with --allow-code" in refuse("train", recipe, "--out", "another")
    assert not Path("imported").exists()
    assert not Path("another").exists()
    run_command("train", "run-0/recipe.toml", "--out", "another", "--allow-code")  # control
    assert Path("imported").exists()


def test_verify_imports_no_code() -> None:
    train()
    Path("mine.py").write_text("open('imported', 'w').close()\n")
    assert run_command("verify", "run-0", "--json").report["ok"] is True
    assert not Path("imported").exists()


def test_terms_have_a_reduction_each_and_a_function_of_ones_own_takes_arguments() -> None:
    terms = {"fit": "mean", "size": {"name": "mine:worst", "power": 3.0, "scale": 0.1}}
    plain = train(objective={"loss": "mine:two_terms", "reduction": terms})
    terms["size"] = {"name": "mine:worst", "power": 3.0, "scale": 0.2}
    scaled = train(objective={"loss": "mine:two_terms", "reduction": terms})
    terms["size"] = {"name": "mine:worst", "power": 4.0, "scale": 0.1}
    powered = train(objective={"loss": "mine:two_terms", "reduction": terms})
    assert len({plain, scaled, powered}) == 3  # neither scale nor argument is passed over


def test_a_reduction_class_of_ones_own_is_made_with_its_arguments() -> None:
    halved = train(objective={"loss": "mine:losses", "reduction": "mine:Halved"})
    quartered = {"name": "mine:Halved", "by": 4, "scale": 2.0}
    assert train(objective={"loss": "mine:losses", "reduction": quartered}) == halved
    plain_sum = train(objective={"loss": "mine:losses", "reduction": "sum"})
    assert plain_sum != halved


FAILING = """
import torch
import torch.nn.functional as F
from torch import nn
import anybatch as ab

calls = 0

def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def data():
    x = torch.arange(240.0).reshape(60, 4) / 240
    return x, torch.arange(60) % 2

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)
"""


@pytest.mark.parametrize(
    ("key", "code", "error"),
    [
        ("model", "def bad():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        (
            "model",
            "class bad(Net):\n    def forward(self, x):\n        return x + 'a'",
            "TypeError",
        ),
        ("data", "def bad():\n    return {}['x']", "KeyError: 'x'"),
        ("data", "def bad():\n    return open('no')", "FileNotFoundError: [Errno 2] No such file"),
        ("loss", "def bad(model, batch):\n    return 1 / 0", "ZeroDivisionError"),
        (
            "loss",
            "def bad(model, batch):\n    return losses(model, batch[0])",
            "types that do not fit",
        ),
        (
            "loss",
            "def bad(model, batch):\n    global calls\n    calls += 1\n"
            "    return losses(model, batch) if calls < 3 else losses(model, {}['late'])",
            "KeyError: 'late'",
        ),
        ("reduction", "def bad(losses):\n    return losses.vaules.mean()", "AttributeError"),
        ("model", "def bad():\n    return Net(3)", "TypeError"),
    ],
)
def test_an_error_in_ones_own_code_is_one_message_with_file_and_line(
    key: str, code: str, error: str
) -> None:
    write_module(Path.cwd(), "mine", f"{FAILING}\n{code}\n")
    section, name = ("objective", key) if key in ("loss", "reduction") else (key, "name")
    sections = {
        **OWN,
        "model": {"name": "mine:Net"},
        "objective": {"loss": "mine:losses"},
    }
    sections[section] = sections[section] | {name: "mine:bad"}
    message = refuse("train", write_recipe(Path(), **sections), "--out", "run")
    assert error in message
    lines = (Path.cwd() / "mine.py").read_text().splitlines()
    assert "in your own code at" in message
    file, _, line = message.rsplit(" at ", 1)[1].splitlines()[0].rpartition(":")
    assert file == str(Path.cwd() / "mine.py")
    assert lines[int(line) - 1] in code or lines[int(line) - 1] in FAILING
    assert Path("run").exists() == ("late" in error)  # after updates there is something to keep


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("model", "nowhere:net", "No module named 'nowhere'"),
        ("model", "mine:nte", "mine has no 'nte'; did you mean 'net'?"),
        ("model", ":net", "Empty module name"),
        ("model", "mine:torch", "is a module, not a function"),
        ("model", "mine:data", "made a tuple. Expected a torch.nn.Module"),
        ("data", "mine:net", "returned a Sequential. It must return a pair (inputs, targets)"),
        ("objective", "mine:data", "cannot be called as data(model, batch): too many positional"),
    ],
)
def test_code_of_the_wrong_kind_is_refused(section: str, name: str, message: str) -> None:
    write_module(Path.cwd(), "mine", GOOD)
    sections = OWN | {section: {"loss" if section == "objective" else "name": name}}
    assert message in refuse("train", write_recipe(Path(), **sections))


def test_a_module_that_fails_while_it_is_imported_is_named_with_its_line() -> None:
    write_module(Path.cwd(), "mine", "import torch\n\nraise OSError('no such thing')\n")
    message = refuse("train", write_recipe(Path(), **OWN))
    assert f"OSError at {Path.cwd() / 'mine.py'}:3: no such thing" in message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("return losses(model, batch).mean()", "returned shape () for a batch of 2 examples"),
        ("return losses(model, batch)[:1]", "returned shape (1,) for a batch of 2 examples"),
        ("return losses(model, batch) > 0", "returned torch.bool"),
        ("return 3.0", "returned a float"),
        ("return {'fit': losses(model, batch)}", "the terms ['fit'], but the objective has one"),
        (
            "return ab.ExampleLosses(losses(model, batch), counts=torch.zeros(len(batch[1])))",
            "All counts of the batch are 0",
        ),
        (
            "return ab.ExampleLosses(losses(model, batch), counts=-torch.ones(len(batch[1])))",
            "a weight below 0 has no mean",
        ),
    ],
)
def test_a_loss_that_no_reduction_can_use_is_refused(code: str, message: str) -> None:
    write_module(Path.cwd(), "mine", f"{FAILING}\ndef bad(model, batch):\n    {code}\n")
    sections = OWN | {"model": {"name": "mine:Net"}, "objective": {"loss": "mine:bad"}}
    assert message in refuse("train", write_recipe(Path(), **sections), "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("nn.parallel.DistributedDataParallel(Net())", "wrapped in DistributedDataParallel"),
        ("nn.DataParallel(Net())", "wrapped in DistributedDataParallel or DataParallel"),
        ("nn.Flatten()", "The model has no trainable parameters"),
        ("Net().requires_grad_(False)", "The model has no trainable parameters"),
    ],
)
def test_a_model_that_cannot_be_trained_as_declared_is_refused(
    code: str, message: str, tmp_path: Path
) -> None:
    write_module(Path.cwd(), "mine", f"{FAILING}\ndef bad():\n    return {code}\n")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sections = OWN | {"model": {"name": "mine:bad"}, "objective": {"loss": "mine:losses"}}
        assert message in refuse("train", write_recipe(Path(), **sections))
    finally:
        torch.distributed.destroy_process_group()
    assert not list(Path().glob("runs/*"))


def test_a_model_that_fails_in_training_alone_is_explained() -> None:
    code = "def bad():\n    return nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))"
    write_module(Path.cwd(), "mine", f"{FAILING}\n{code}\n")
    sections = {"data": {"name": "mine:data"}, "model": {"name": "mine:bad"}, "batch": {"size": 1}}
    message = refuse("train", write_recipe(Path(), **sections))
    assert "the model or its loss failed on a batch: ValueError: Expected more than 1" in message


def test_a_model_whose_output_is_no_tensor_trains_but_does_not_predict() -> None:
    code = (
        "class bad(Net):\n    def forward(self, x):\n        return {'out': self.layer(x)}\n"
        "def own(model, batch):\n"
        "    return F.cross_entropy(model(batch[0])['out'], batch[1], reduction='none')\n"
    )
    write_module(Path.cwd(), "mine", f"{FAILING}\n{code}\n")
    sections = OWN | {"model": {"name": "mine:bad"}, "objective": {"loss": "mine:own"}}
    run_command("train", write_recipe(Path(), **sections), "--out", "run")
    message = refuse("predict", "run", "--allow-code")
    assert "the model gave dict for 12 examples. Expected a tensor" in message


def test_weights_in_any_memory_order_are_exported() -> None:
    code = (
        "class bad(Net):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer.weight = nn.Parameter(torch.randn(4, 2).T)\n"
        "        self.tied = self.layer.weight\n"
    )
    write_module(Path.cwd(), "mine", f"{FAILING}\n{code}\n")
    sections = OWN | {"model": {"name": "mine:bad"}}
    run_command("train", write_recipe(Path(), **sections), "--out", "run")
    assert run_command("export", "run", "--allow-code", "--json").report["tensors"] == 3
