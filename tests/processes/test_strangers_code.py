"""No code of a stranger runs unless one says so. Each case has a control in which it does run."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strangers import MARK, anybatch, marking, run_refused, write


class Bomb:
    """Object whose unpickling leaves the mark."""

    def __init__(self, folder: Path) -> None:
        self.line = marking(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.line,)


def ran(folder: Path) -> bool:
    """Return whether the stranger's code has run, and remove the mark."""
    mark = folder / MARK
    result = mark.exists()
    mark.unlink(missing_ok=True)
    return result


def stranger_model(folder: Path, **config: Any) -> Path:
    """A folder of Transformers whose model is code of its own."""
    model = folder / "model"
    model.mkdir()
    stored = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "own.Own"
    )
    (model / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": stored} | config)
    )
    (model / "own.py").write_text(marking(folder) + "raise SystemExit(0)\n")
    return model


def test_trust_remote_code_in_a_recipe_needs_the_flag(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    args = {"folder": str(stranger_model(tmp_path)), "trust_remote_code": True}
    write(tmp_path, {"model.name": "pretrained", "model.args": args})
    assert "--allow-code" in run_refused(tmp_path, "train", "recipe.toml", "--out", "run")
    (tmp_path / "run.json").write_text("{}")  # now the recipe lies in a run
    assert "--allow-code" in run_refused(tmp_path, "train", "recipe.toml", "--out", "run")
    assert not ran(tmp_path)
    anybatch(tmp_path, "train", "recipe.toml", "--out", "run", "--allow-code")
    assert ran(tmp_path)  # the control


@pytest.mark.parametrize(
    ("config", "args", "message"),
    [
        ({}, {}, "cannot become a"),
        ({"quantization_config": {"quant_method": "x"}}, {}, "states quantization_config"),
        ({"attn_implementation": "someone/kernel"}, {}, "states attn_implementation"),
        ({"text_config": {"_attn_implementation": {"": "a/b"}}}, {}, "states _attn_implementation"),
        ({"configuration_files": ["config.2.json"]}, {}, "states configuration_files"),
        ({"model_type": "bert"}, {"attn_implementation": "a/b"}, "attn_implementation is no plain"),
        ({"model_type": "bert"}, {"use_safetensors": False}, "use_safetensors is no plain key"),
        ({"model_type": "bert"}, {"gguf_file": "x"}, "gguf_file is no plain key"),
        ({"model_type": "bert"}, {"quantization_config": {}}, "quantization_config is no plain"),
        ({"model_type": "bert"}, {"_configuration_file": "x"}, "_configuration_file is no plain"),
        ({"model_type": "bert"}, {"kind": "pipeline"}, "transformers has no model 'pipeline'"),
        ({"model_type": "bert"}, {"kind": "AutoTokenizer"}, "has no model 'AutoTokenizer'"),
    ],
)
def test_nothing_of_a_models_folder_runs_without_trust(
    tmp_path: Path, config: dict[str, Any], args: dict[str, Any], message: str
) -> None:
    pytest.importorskip("transformers")
    from anybatch.errors import ModelError
    from anybatch.zoo import pretrained

    folder = stranger_model(tmp_path, **config)
    with pytest.raises(ModelError, match=message):
        pretrained(str(folder), **args)
    assert not ran(tmp_path)


def test_pickled_weights_of_a_models_folder_are_not_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=9, intermediate_size=8, **small)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    args = {"folder": "model", "num_labels": 2}
    write(tmp_path, {"model.name": "pretrained", "model.args": args})
    text = anybatch(tmp_path, "train", "recipe.toml", "--out", "run")[2]  # after a progress bar
    assert "Layer model.bert" in text  # control: the folder itself is read
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path)}, tmp_path / "model" / "pytorch_model.bin")
    assert "cannot become a" in run_refused(tmp_path, "train", "recipe.toml", "--out", "run")
    assert not ran(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.name": "os:system", "model.args": {"command": f"touch {MARK}"}},
        {"data.name": "subprocess:check_call", "data.args": {"args": ["touch", MARK]}},
        {"optimizer.name": "runpy:run_path"},
        {"objective.loss": "builtins:exec"},
        {"objective.reduction": "torch.hub:load"},
        {"objective.reduction": {"a": {"name": "theirs:reduction"}}},
        {"order.name": "theirs:order"},
    ],
)
def test_a_recipe_calls_no_code_from_elsewhere(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "theirs.py").write_text(marking(tmp_path))
    recipe = write(folder, changes)
    write(tmp_path)
    text = run_refused(tmp_path, "train", recipe)
    # A module beside the recipe is not found from the folder that one is in.
    assert (
        "does not lie in the folder that you are in" in text or "No module named 'theirs'" in text
    )
    assert not ran(tmp_path)


def test_a_recipe_calls_code_from_elsewhere_with_the_flag(tmp_path: Path) -> None:  # the control
    args = {"command": f"touch {MARK}"}
    recipe = write(tmp_path, {"model.name": "os:system", "model.args": args})
    text = run_refused(tmp_path, "train", recipe, "--allow-code")
    assert "Expected a torch.nn.Module" in text
    assert ran(tmp_path)


def test_modules_of_the_current_folder_do_not_shadow_packages(tmp_path: Path) -> None:
    for name in ("typer", "torch", "pydantic", "selectors", "signal", "sitecustomize", "rich"):
        (tmp_path / f"{name}.py").write_text(marking(tmp_path) + "raise SystemExit(0)\n")
    write(tmp_path)
    assert anybatch(tmp_path, "train", "recipe.toml", "--out", "a", "--ranks", 2)[0] == 0
    code, _, text = anybatch(tmp_path, "compare", "recipe.toml", "recipe.toml", "--seeds", 2)
    assert (code, "Traceback" in text) == (0, False), text
    assert not ran(tmp_path)
    subprocess.run([sys.executable, "-c", "import typer"], cwd=tmp_path, check=True)
    assert ran(tmp_path)  # the control


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


PROGRAMS = {
    "filter.evil.clean": "{touch}; cat",
    "filter.evil.process": "{touch}",
    "filter.e=v.clean": "{touch}; cat",
    "diff.evil.textconv": "{touch}; cat",
    "diff.evil.command": "{touch}",
    "diff.external": "{touch}",
    "core.fsmonitor": "{touch}",
}


@pytest.mark.parametrize("key", PROGRAMS)
def test_git_runs_no_program_that_a_repository_names(tmp_path: Path, key: str) -> None:
    driver = key.split(".")[1] if key.count(".") == 2 else "evil"
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitattributes").write_text(f"*.txt filter={driver} diff={driver}\n")
    (tmp_path / "a.txt").write_text("before\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "config", key, PROGRAMS[key].format(touch=f"touch '{tmp_path / MARK}'"))
    (tmp_path / "a.txt").write_text("later\n")
    code = (
        "from pathlib import Path; from anybatch.runs.environment import read_git_state;"
        "found = read_git_state(Path('/nowhere')); assert 'a.txt' in str(found['files']), found"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not ran(tmp_path)
    subprocess.run(["git", "--no-pager", "diff"], cwd=tmp_path, capture_output=True)
    assert ran(tmp_path)  # the control


def test_no_pickle_of_a_data_file_is_read(tmp_path: Path) -> None:
    array = np.array([Bomb(tmp_path)], dtype=object)
    np.savez(tmp_path / "rows.npz", inputs=array, targets=array)
    write(tmp_path, {"data.name": "npz", "data.args": {"path": "rows.npz"}})
    assert "never unpickled" in run_refused(tmp_path, "train", "recipe.toml")
    assert not ran(tmp_path)
    np.load(tmp_path / "rows.npz", allow_pickle=True)["inputs"]
    assert ran(tmp_path)  # the control


def test_no_extension_type_of_a_parquet_file_is_unpickled(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from anybatch.data import load_parquet

    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(tmp_path)),
    }
    field = arrow.field("x", arrow.float64(), metadata=metadata)
    schema = arrow.schema([field, arrow.field("y", arrow.int64())])
    table = arrow.Table.from_arrays([arrow.array([1.0, 2.0]), arrow.array([0, 1])], schema=schema)
    parquet.write_table(table, tmp_path / "rows.parquet")
    load_parquet(str(tmp_path / "rows.parquet"), "y")
    assert not ran(tmp_path)
    pickle.loads(metadata[b"ARROW:extension:metadata"])
    assert ran(tmp_path)  # the control


def test_no_loading_script_of_a_data_set_runs(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(marking(tmp_path))
    args = {"path": "rows", "target": "y"}
    write(tmp_path, {"data.name": "hugging_face", "data.args": args})
    assert "holds no data set that can be read" in run_refused(tmp_path, "train", "recipe.toml")
    assert not ran(tmp_path)


def test_weights_to_start_from_are_no_pickle(tmp_path: Path) -> None:
    torch.save({"x": Bomb(tmp_path)}, tmp_path / "weights.pt")
    write(tmp_path, {"model.weights": "weights.pt"})
    assert "no readable safetensors file" in run_refused(tmp_path, "train", "recipe.toml")
    assert not ran(tmp_path)
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert ran(tmp_path)  # the control


def test_a_checkpoint_with_its_seal_made_right_again_runs_nothing(tmp_path: Path) -> None:
    from anybatch.runs.manifest import MANIFEST, StoredFile, format_manifest, verify

    write(tmp_path)
    assert anybatch(tmp_path, "train", "recipe.toml", "--out", "run")[0] == 0
    path = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    result = verify(path)
    torch.save({"x": Bomb(tmp_path)}, path / "model.pt")
    content = (path / "model.pt").read_bytes()
    stored = StoredFile(
        name="model.pt", num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    files = tuple(stored if file.name == "model.pt" else file for file in result.files)
    (path / MANIFEST).write_bytes(format_manifest(dataclasses.replace(result, files=files)))
    verify(path)  # control: the seal is right
    assert "ran nothing of it" in run_refused(tmp_path, "evaluate", "run")
    assert "ran nothing of it" in run_refused(tmp_path, "resume", "run", "--set", "run.epochs=2")
    assert not ran(tmp_path)
