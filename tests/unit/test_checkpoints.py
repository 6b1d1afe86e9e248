"""Checkpoints: whole or absent, every damage found by name, nothing run on loading.

Manifests are forged here with a seal written out anew (`sealed`), so that the tests of what
hides behind a valid manifest share no code with the library.
"""

import errno
import hashlib
import io
import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import CheckpointError
from anybatch.runs import manifest
from anybatch.runs.checkpoints import find_newest, load, verify, write
from nested_states import same, states
from properties import seeded_examples
from small_checkpoints import SETTINGS, small


def seal_body(body):
    """A manifest's bytes, from its definition: JSON with sorted keys, closed by its own hash."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, indent=1) + "\n"
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(body, sort_keys=True, indent=1) + "\n").encode()


def forge(checkpoint, **changes):
    """Replace parts of a manifest and seal it again, as an attacker would."""
    file = checkpoint.path / "manifest.json"
    body = json.loads(file.read_bytes()) | changes
    file.write_bytes(seal_body({key: value for key, value in body.items() if value is not None}))


def replace_file(checkpoint, name, data):
    """Replace a file and its entry in the manifest, as an attacker would."""
    (checkpoint.path / name).write_bytes(data)
    files = json.loads((checkpoint.path / "manifest.json").read_bytes())["files"]
    forge(checkpoint, files=files | {name: [len(data), hashlib.sha256(data).hexdigest()]})


def check_refusal(path, match):
    """Assert that a checkpoint does not verify, with a message that starts with its path."""
    with pytest.raises(CheckpointError, match=match) as caught:
        verify(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.slow
@seeded_examples(30)
@given(st.dictionaries(st.sampled_from(["model", "optimizer", "user_1"]), states()))
def test_any_state_comes_back_bit_for_bit(any_state):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, step=0, state=any_state, settings={})
        result = find_newest(folder).checkpoint
        assert same(load(result), any_state)


def test_a_training_state_comes_back_with_its_settings(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved_state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint = write(tmp_path / "run" / "new", step=12, state=saved_state, settings=SETTINGS)
    result = find_newest(tmp_path / "run" / "new").checkpoint
    assert result == checkpoint == verify(checkpoint.path)
    assert (result.step, result.settings, result.path.name) == (12, SETTINGS, "step-000000000012")
    assert same(load(result), saved_state)


def test_the_deepest_state_that_is_taken_comes_back(tmp_path):
    nested = 0
    for _ in range(99):
        nested = [nested]
    checkpoint = write(tmp_path, step=0, state={"user": nested}, settings={})
    assert same(load(checkpoint), {"user": nested})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "model.pt"])
def test_a_flipped_bit_in_any_byte_is_found(tmp_path, name):
    checkpoint = small(tmp_path)
    file = checkpoint.path / name
    data = file.read_bytes()
    for position in range(len(data)):
        for mask in (0x01, 0x20) if name == "manifest.json" else (1 << position % 8,):
            flipped = data[position] ^ mask
            file.write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
            check_refusal(checkpoint.path, match=rf"{re.escape(name)}: byte changed")
    file.write_bytes(data)
    assert verify(checkpoint.path) == checkpoint


def test_torch_alone_loads_a_flipped_bit_without_a_word():
    """Control: this is why files are hashed."""
    saved = io.BytesIO()
    torch.save(torch.full((2, 3), 1.0), saved)
    data = saved.getvalue()
    one = b"\x00\x00\x80\x3f"
    assert data.count(one * 6) == 1
    damaged = data.replace(one * 6, one * 5 + b"\x00\x00\x80\x3e")
    assert torch.load(io.BytesIO(damaged), weights_only=True)[1, 2] == 0.25


@pytest.mark.parametrize("name", ["manifest.json", "model.pt"])
def test_a_file_cut_anywhere_is_found(tmp_path, name):
    checkpoint = small(tmp_path)
    file = checkpoint.path / name
    data = file.read_bytes()
    for length in range(0, len(data), 1 if name == "manifest.json" else 7):
        file.write_bytes(data[:length])
        check_refusal(checkpoint.path, match=rf"{re.escape(name)}: .*truncated")
    file.write_bytes(data + b"\n")
    check_refusal(checkpoint.path, match=rf"{re.escape(name)}: (byte changed|bytes added)")


DAMAGES = {
    "model.pt: missing": lambda path: (path / "model.pt").unlink(),
    "notes.txt: unexpected file": lambda path: (path / "notes.txt").touch(),
    "foreign: no manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest.json: .*foreign": lambda path: (path / "manifest.json").write_text('{"a": 1}'),
    "manifest.json: byte changed, truncated": lambda path: (path / "manifest.json").write_text(""),
    "model.pt: truncated. .* states \\d+ bytes; the file has 1": lambda path: (
        path / "model.pt"
    ).write_bytes(b"x"),
    "model.pt is a link to .* It must be a plain file": lambda path: (
        (path / "model.pt").rename(path.parent / "moved"),
        (path / "model.pt").symlink_to(path.parent / "moved"),
    ),
}


@pytest.mark.parametrize("message", DAMAGES.keys())
def test_damage_is_named(tmp_path, message):
    checkpoint = small(tmp_path)
    DAMAGES[message](checkpoint.path)
    check_refusal(checkpoint.path, match=message)


def test_a_disk_that_cannot_read_is_named(tmp_path, monkeypatch):
    checkpoint = small(tmp_path)

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "read_file", failing)
    check_refusal(
        checkpoint.path, match=r"cannot be read .*Input/output error.*Check its permissions"
    )
    assert find_newest(tmp_path).checkpoint is None


FORGERIES = {
    "written by a newer version. Its format is 2, and this version reads 1": {"format": 2},
    "foreign. Its format is 'x', and this version reads 1": {"format": "x"},
    "foreign. .* KeyError\\('digest'\\)": {"digest": None},
    "foreign. .*invalid literal": {"step": "seven"},
    "foreign. .* AttributeError": {"files": [1]},
    "foreign. .* ValueError": {"files": {"model.pt": [1]}},
    "renamed. .* must be step-000000000008": {"step": 8},
    "/secret: missing": {"files": {"../../secret": [1, "0"]}},
}


@pytest.mark.parametrize("message", FORGERIES.keys())
def test_a_manifest_sealed_by_somebody_else_is_checked_all_the_same(tmp_path, message):
    checkpoint = small(tmp_path)
    forge(checkpoint)
    assert verify(checkpoint.path) == checkpoint  # control: the forger's seal is right
    forge(checkpoint, **FORGERIES[message])
    check_refusal(checkpoint.path, match=message)


def test_a_copy_under_another_name_verifies(tmp_path):
    checkpoint = small(tmp_path / "run")
    shutil.copytree(checkpoint.path, tmp_path / "best")
    assert verify(tmp_path / "best").digest == checkpoint.digest


def test_files_that_change_after_they_verified_are_not_loaded(tmp_path):
    checkpoint = small(tmp_path)
    file = checkpoint.path / "model.pt"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"model.pt: byte changed. .* SHA-256 \w+"):
        load(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model.pt: cannot be read .*Scan the folder again"):
        load(checkpoint)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_bomb_behind_a_valid_manifest_is_refused_and_not_run(tmp_path):
    checkpoint = small(tmp_path / "run")
    zipped = io.BytesIO()
    torch.save({"weight": Bomb(tmp_path / "ran")}, zipped)
    for bomb in (zipped.getvalue(), pickle.dumps(Bomb(tmp_path / "ran"))):
        replace_file(checkpoint, "model.pt", bomb)
        with pytest.raises(CheckpointError, match=r"model.pt: .* found .*, and ran nothing of it"):
            load(verify(checkpoint.path))
        assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(zipped.getvalue()), weights_only=False)
    assert (tmp_path / "ran").exists()  # control: the bomb works


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_a_file_that_is_no_state_is_refused(tmp_path, data):
    checkpoint = small(tmp_path)
    replace_file(checkpoint, "model.pt", data)
    with pytest.raises(CheckpointError, match=r"model.pt: expected tensors and plain values"):
        load(verify(checkpoint.path))


def test_another_content_behind_a_valid_manifest_is_refused(tmp_path):
    checkpoint = small(tmp_path / "run")
    other = small(tmp_path / "other", value=2.0)
    replace_file(checkpoint, "model.pt", (other.path / "model.pt").read_bytes())
    with pytest.raises(CheckpointError, match=f"manifest states {checkpoint.digest}"):
        load(verify(checkpoint.path))
