"""Compare the git state of the user's code with git's own commands; git may fail, too."""

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from anybatch.runs import environment as module
from anybatch.runs.environment import describe_environment, read_git_state
from small_training import rows, train_small

IDENTITY = {
    f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}


def git(*arguments):
    """Return what git prints in the working folder."""
    result = subprocess.run(
        ["git", *arguments], check=True, capture_output=True, env=os.environ | IDENTITY
    )
    return result.stdout


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Create the user's repository in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # inside a hook
        monkeypatch.delenv(name)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    git("init", "--quiet")
    Path("train.py").write_text("lr = 0.1\n")
    Path("models").mkdir()
    Path("models/my nät.py").write_text("width = 8\n")
    Path("same.py").touch()
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    return tmp_path


def test_a_clean_repository_is_its_commit(code, monkeypatch):
    head = git("rev-parse", "HEAD").decode().strip()
    clean = {"commit": head, "uncommitted": 0, "files": [], "diff": None}
    assert read_git_state(Path("runs/mine")) == clean
    monkeypatch.chdir("models")
    assert read_git_state(Path("runs/mine")) == clean


def test_what_differs_from_the_commit_is_named_and_hashed(code):
    Path("train.py").write_text("lr = 0.2\n")
    Path("models/my nät.py").unlink()
    Path("new.py").touch()
    os.utime("same.py", (1, 1))  # touched, and the same
    diff = git("diff", "--full-index", "HEAD")
    assert b"+lr = 0.2" in diff
    assert read_git_state(Path("runs/mine")) == {
        "commit": git("rev-parse", "HEAD").decode().strip(),
        "uncommitted": 3,
        "files": [" D models/my nät.py", " M train.py", "?? new.py"],
        "diff": hashlib.sha256(diff).hexdigest(),
    }


def test_another_change_has_another_hash(code):
    hashes = set()
    for text in ("lr = 0.2\n", "lr = 0.3\n", "lr = 0.1\n"):
        Path("train.py").write_text(text)
        hashes.add(read_git_state(code)["diff"])
    assert len(hashes) == 3
    assert None in hashes  # the text of the commit


def test_the_run_itself_is_no_change_but_another_is(code):
    train_small("runs/mine")
    assert read_git_state(Path("runs/mine"))["files"] == []
    assert read_git_state(code / "runs" / "mine")["files"] == []
    assert read_git_state(Path("runs/other"))["files"] == ["?? runs/"]  # control


def test_only_the_first_files_are_named(code):
    for number in range(30):
        Path(f"{number:02}.py").touch()
    result = read_git_state(Path("runs/mine"))
    assert (result["uncommitted"], len(result["files"])) == (30, 20)


def test_the_repository_is_not_written_to(code):
    os.utime("same.py", (1, 1))  # touched, and the same: git would refresh its index
    Path("train.py").write_text("lr = 0.2\n")
    before = Path(".git/index").read_bytes()
    assert read_git_state(Path("runs/mine"))["uncommitted"] == 1
    assert Path(".git/index").read_bytes() == before
    git("diff", "HEAD")
    assert Path(".git/index").read_bytes() != before  # control


def test_a_run_keeps_it_with_each_session(code):
    train_small("runs/mine")
    Path("train.py").write_text("lr = 0.2\n")
    train_small("runs/mine")
    first, second = (row["git"] for row in rows(Path("runs/mine"), "session"))
    assert (first["files"], second["files"]) == ([], [" M train.py"])


def no_repository(folder):
    assert subprocess.run(["git", "rev-parse"], capture_output=True).returncode != 0


def no_commit(folder):
    git("init", "--quiet")


def no_git(folder):
    os.environ["PATH"] = str(folder)


def git_that(folder, does):
    """A git in the way of the one there is."""
    Path("git").write_text(f"#!/bin/sh\n{does}\n")
    Path("git").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def git_that_fails(folder):
    git_that(folder, "echo fatal: detected dubious ownership >&2; exit 128")


def git_that_hangs(folder):
    git_that(folder, "exec sleep 30")


@pytest.mark.parametrize(
    "how",
    [no_repository, no_commit, no_git, git_that_fails, git_that_hangs],
    ids=lambda f: f.__name__,
)
def test_where_git_has_no_answer_there_is_none_and_nothing_is_printed(
    tmp_path, monkeypatch, capfd, how
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back at the end
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    how(tmp_path)
    start = time.monotonic()
    assert read_git_state(tmp_path / "run") is None
    assert time.monotonic() - start < 5
    assert capfd.readouterr() == ("", "")


def test_a_git_too_slow_to_look_at_all_files_still_tells_the_commit(code, monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(module, "_TIMEOUT", 1.0)
    head = git("rev-parse", "HEAD").decode().strip()
    git_that(code, f'case "$*" in *rev-parse*) echo {head}; echo {code};; *) exec sleep 30;; esac')
    nothing = {"uncommitted": None, "files": None, "diff": None}
    assert read_git_state(code / "run") == {"commit": head, **nothing}


def test_an_environment_is_plain_json(code):
    result = describe_environment(code / "run")
    assert json.loads(json.dumps(result)) == result
    assert result["cores"] == os.cpu_count()
