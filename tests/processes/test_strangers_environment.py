"""Environment variables neither run a stranger's code nor move what a run writes.

Each case has a control in which the variable, or the code, does have its effect.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server

import pytest

import tracked_training
from anybatch.data import load_csv
from anybatch.errors import AnybatchError, DataError
from anybatch.paths import find_user_folder
from strangers import MARK, TABLE, anybatch, marking, reseal, run_refused, write
from test_strangers_code import Bomb, git, ran


def python(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with variables set."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_variable_makes_a_checkpoint_unpickle_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    assert anybatch(tmp_path, "train", "recipe.toml", "--out", "run")[0] == 0
    path = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    reseal(path, "model.pt", Bomb(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for command in ("evaluate", "resume", "export", "verify"):
        assert "ran nothing of it" in anybatch(tmp_path, command, "run")[2]
    assert not ran(tmp_path)
    program = f"import torch; torch.load({str(path / 'model.pt')!r})"
    python(tmp_path, "-W", "ignore", "-c", program)
    assert ran(tmp_path)  # the control


def test_a_relative_folder_of_the_users_state_brings_no_consent_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "theirs.py").write_text(marking(tmp_path))
    recipe = write(stranger, {"model.name": "theirs:net"})
    (tmp_path / "rows.csv").write_text(TABLE)
    program = (
        "from pathlib import Path; from anybatch.recipe.code import remember_code;"
        "from anybatch.recipe.files import read_recipe;"
        "remember_code([Path('stranger').absolute()], read_recipe(Path('stranger/recipe.toml')))"
    )
    state = tmp_path / "state"
    ended = python(tmp_path, "-c", program, XDG_STATE_HOME=str(state))
    assert (state / "anybatch/code.json").is_file(), ended.stderr
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert "only with --allow-code" in run_refused(tmp_path, "train", recipe)
    assert not ran(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    anybatch(tmp_path, "train", recipe)
    assert ran(tmp_path)  # the control


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "XDG_CACHE_HOME"])
def test_the_users_folder_is_absolute_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "state", "./state", "../state", "~/state"):
        monkeypatch.setenv(variable, value)
        assert find_user_folder(variable, ".own") == tmp_path / ".own" / "anybatch"
    monkeypatch.setenv(variable, "/own")
    assert find_user_folder(variable, ".own") == Path("/own/anybatch")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert find_user_folder(variable, ".own") == Path("/own/anybatch")
    monkeypatch.delenv(variable)
    assert find_user_folder(variable, ".own") is None


def test_a_user_without_a_home_needs_the_flag_for_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from anybatch.recipe import code
    from command_line import recipe

    named = recipe(**{"model.name": "json:loads"})
    monkeypatch.setattr(code, "find_memory_folder", lambda: None)
    code.remember_code([], named)
    assert not code.is_remembered([], named)
    with pytest.raises(AnybatchError, match="only with --allow-code"):
        code.check_code(Path("/nowhere"), named, allow_code=False)


def test_variables_of_git_run_no_program(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("before\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "a.txt").write_text("later\n")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / MARK}'\n")
    program.chmod(0o755)
    names = ("GIT_EXTERNAL_DIFF", "GIT_PAGER", "PAGER", "GIT_EDITOR", "GIT_ASKPASS", "GIT_SSH")
    variables = dict.fromkeys(names, str(program))
    variables |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor"}
    variables |= {"GIT_CONFIG_VALUE_0": str(program)}
    code = (
        "from pathlib import Path; from anybatch.runs.environment import read_git_state;"
        "found = read_git_state(Path('/nowhere')); assert 'a.txt' in str(found['files']), found"
    )
    ended = python(tmp_path, "-c", code, **variables)
    assert (ended.returncode, ran(tmp_path)) == (0, False), ended.stderr
    for name in ("GIT_EXTERNAL_DIFF", "GIT_CONFIG_VALUE_0"):  # the control
        output = {k: v for k, v in variables.items() if k == name or k.startswith("GIT_CONFIG_")}
        output |= (
            {} if name in output and name != "GIT_EXTERNAL_DIFF" else {"GIT_CONFIG_COUNT": "0"}
        )
        subprocess.run(["git", "diff"], cwd=tmp_path, env={**os.environ, **output}, check=False)
        assert ran(tmp_path), name


def test_no_variable_moves_what_a_run_and_its_trackers_write(tmp_path: Path) -> None:
    for name in tracked_training.NAMES:
        pytest.importorskip(name)
    elsewhere = tmp_path / "elsewhere"
    variables = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{elsewhere}/mlflow.db",
        "MLFLOW_REGISTRY_URI": f"sqlite:///{elsewhere}/registry.db",
        "MLFLOW_EXPERIMENT_NAME": "theirs",
        "MLFLOW_RUN_ID": "0" * 32,
        "WANDB_DIR": str(elsewhere),
        "WANDB_MODE": "online",
        "WANDB_PROJECT": "theirs",
        "WANDB_NAME": "theirs",
    }
    folder = tmp_path / "here"
    folder.mkdir()
    program = Path(tracked_training.__file__)
    ended = python(folder, program, "run", **variables)
    assert ended.returncode == 9, ended.stderr  # it ends as if it was killed
    assert not elsewhere.exists()
    assert [path.name for path in folder.iterdir()] == ["run"]
    assert {"tensorboard", "mlflow.db", "wandb"} < {
        path.name for path in (folder / "run").iterdir()
    }
    control = "import mlflow; mlflow.set_experiment('mine')"
    (tmp_path / "elsewhere").mkdir()
    python(folder, "-c", control, MLFLOW_TRACKING_URI=variables["MLFLOW_TRACKING_URI"])
    assert (elsewhere / "mlflow.db").exists()  # the control


@contextmanager
def hub() -> Iterator[tuple[str, list[bytes]]]:
    """Listen as a hub of models would: its address, and the requests that came."""
    requests: list[bytes] = []
    with create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    with server.accept()[0] as connection:
                        requests.append(connection.recv(99))
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests


def test_no_variable_opens_the_network_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "bert"}))
    write(tmp_path, {"model.name": "pretrained", "model.args": {"folder": "model"}})
    with hub() as (address, requests):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
        assert "cannot become a" in run_refused(tmp_path, "train", "recipe.toml")
        shutil.move(tmp_path / "model", tmp_path / "away")
        assert "has no config.json" in run_refused(tmp_path, "train", "recipe.toml")
        assert requests == []
        program = "from huggingface_hub import HfApi; HfApi().model_info('model')"
        python(tmp_path, "-c", program)
        assert requests != []  # the control


@pytest.mark.parametrize(
    "variables",
    [
        {"COLUMNS": "x", "TERM": "unknown", "GIT_CONFIG_COUNT": "9" * 5000, "LOCAL_RANK": "x"},
        {"COLUMNS": "-5", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "100000", "PYTHONIOENCODING": "ascii", "HOME": "/dev/null", "TMPDIR": "/none"},
        {"ANYBATCH_KERNELS": "x", "XDG_STATE_HOME": "/dev/null", "GIT_DIR": "/dev/null"},
    ],
)
def test_odd_values_of_variables_end_in_no_traceback(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    write(tmp_path)
    for command in (["train", "recipe.toml", "--out", "run"], ["show", "run"]):
        ended = python(tmp_path, "-m", "anybatch", *command, **variables)
        assert "Traceback" not in ended.stderr, ended.stderr
        assert ended.returncode in (0, 2), ended.stderr


@pytest.mark.parametrize("path", ["~/rows.csv", "$HOME/rows.csv", "${SECRET}", "%SECRET%"])
def test_no_variable_is_put_into_a_path_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "rows.csv").write_text(TABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET", str(tmp_path / "rows.csv"))
    with pytest.raises(DataError, match=rf"^{re.escape(path)}[^/]* cannot be read") as caught:
        load_csv(path, "y")
    assert str(tmp_path) not in str(caught.value)
    assert os.path.exists(os.path.expandvars(os.path.expanduser(path))) == ("%" not in path)
