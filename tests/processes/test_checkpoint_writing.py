"""Writing checkpoints: the order of the calls, crashes, full disks, steps that exist, pruning."""

import errno
import io
import os
import re
import resource
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from anybatch.errors import CheckpointError
from anybatch.runs import tensor_files
from anybatch.runs.checkpoints import find_newest, load, verify, write
from anybatch.runs.data_fingerprint import DATA
from anybatch.runs.tensor_files import unpickle
from small_checkpoints import SETTINGS, names, small, state


def test_files_reach_the_disk_before_their_manifest_and_that_before_the_name(tmp_path, monkeypatch):
    calls = []

    def describe(descriptor):
        inode = os.fstat(descriptor).st_ino
        (path,) = (path for path in [tmp_path, *tmp_path.rglob("*")] if path.stat().st_ino == inode)
        return path

    def fsync(descriptor):
        path = describe(descriptor)
        calls.append(f"fsync {path.relative_to(tmp_path)}")
        if path.is_file():
            flushed[path.name] = path.stat().st_size
        if path.suffix == ".pt":
            assert not (path.parent / "manifest.json").exists()

    def rename(source, target):
        calls.append(f"rename {Path(target).relative_to(tmp_path)}")
        actual(source, target)

    flushed, actual = {}, os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    checkpoint = small(tmp_path / "a" / "b")
    partial = "a/b/step-000000000007.partial"
    assert calls == [
        "fsync .",  # holds the new folder a
        "fsync a",
        f"fsync {partial}/model.pt",
        f"fsync {partial}/optimizer.pt",
        f"fsync {partial}/manifest.json",
        f"fsync {partial}",
        "rename a/b/step-000000000007",
        "fsync a/b",
    ]
    assert flushed == {path.name: path.stat().st_size for path in checkpoint.path.iterdir()}


KILLED = """
import os, signal, sys, torch
from anybatch.runs import checkpoints, tensor_files

def killed(event, folder):
    count = 0
    def counted(call):
        def wrapper(*arguments):
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return wrapper
    os.fsync, os.rename = counted(os.fsync), counted(os.rename)
    tensor_files.Output.write = counted(tensor_files.Output.write)
    checkpoints.write(folder, step=2, state={"model": torch.ones(3) * 2}, settings={})

for event in range(1, 1000):
    folder = f"{sys.argv[1]}/{event:03d}"
    checkpoints.write(folder, step=1, state={"model": torch.ones(3)}, settings={})
    child = os.fork()
    if child == 0:
        killed(event, folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break  # it has come to its end: no such event
"""


def test_a_process_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=60)
    steps = []
    for folder in sorted(tmp_path.iterdir()):
        scan = find_newest(folder)
        assert scan.refusals == ()
        assert load(scan.checkpoint)["model"].tolist() == [float(scan.checkpoint.step)] * 3
        steps.append(scan.checkpoint.step)
        write(folder, step=2, state={"model": torch.ones(3) * 2}, settings={})
        assert names(folder) == ["step-000000000001", "step-000000000002"]
    # The old one up to the rename, the new one from then on: the last fsync, and the whole write.
    assert steps == [1] * (len(steps) - 2) + [2, 2]
    assert len(steps) > 20


def test_what_a_crash_left_is_named_and_removed_and_nothing_else(tmp_path, caplog):
    stale = tmp_path / "step-000000000005.partial"
    (stale / "deep").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    small(tmp_path)
    assert names(tmp_path) == ["notes", "step-000000000007"]
    assert caplog.messages == [f"{stale} is removed: a write that was interrupted has left it."]


class FullDisk:
    """A file on a disk with room for so many more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room[0] -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextmanager
def disk_with_room_for(num_bytes):
    room, create = [num_bytes], tensor_files.Output.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tensor_files.Output, "__init__", lambda out, file: create(out, FullDisk(file, room))
        )
        yield


def test_torch_alone_hides_a_full_disk():
    """Control: this is why the first failed write is remembered."""
    kinds = set()
    for room in range(0, 1500, 50):
        with pytest.raises((OSError, RuntimeError), match=r"No space|unexpected pos") as caught:
            torch.save(state(), FullDisk(io.BytesIO(), [room]))
        kinds.add(caught.type)
    assert RuntimeError in kinds


def test_a_disk_that_fills_up_anywhere_leaves_the_previous_checkpoint_alone(tmp_path):
    previous = small(tmp_path, step=1)
    needed = sum(path.stat().st_size for path in previous.path.iterdir())
    message = (
        r"could not write .*step-000000000002: .*No space left on device.* Needed: 0.000 MB .*; "
        r"free: [\d.]+ MB. The previous checkpoint is untouched. Free some space"
    )
    for room in [*range(0, needed, 211), needed - 1]:
        with disk_with_room_for(room), pytest.raises(CheckpointError, match=message):
            small(tmp_path, step=2)
        assert names(tmp_path) == ["step-000000000001"]
        assert find_newest(tmp_path).checkpoint == previous
    with disk_with_room_for(needed):  # control: with room enough it is written
        assert small(tmp_path, step=2).step == 2


class FailingDisk(io.BytesIO):
    """A file of which the read of that number fails."""

    def __init__(self, content, number):
        super().__init__(content)
        self.left = number

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, *size):
        self._count()
        return super().read(*size)

    def readinto(self, buffer):
        self._count()
        return super().readinto(buffer)


def save_state():
    file = io.BytesIO()
    torch.save(state(), file)
    return file.getvalue()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_read_that_fails_is_blamed_on_the_disk_and_not_on_the_file(device):
    content, whole = save_state(), FailingDisk(save_state(), 0)
    unpickle(whole, device, Path("model.pt"))
    num_reads = -whole.left
    assert num_reads > 5
    for number in range(1, num_reads + 1):
        with pytest.raises(OSError, match="Input/output error"):
            unpickle(FailingDisk(content, number), device, Path("model.pt"))


def test_torch_and_zipfile_hide_a_read_that_fails():
    """Control: this is why the failed read is remembered."""
    assert not zipfile.is_zipfile(FailingDisk(save_state(), 1))


@contextmanager
def file_size_limit(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_of_the_system_is_met_like_a_full_disk(tmp_path):
    previous = small(tmp_path, step=1)
    large = {"model": torch.ones(100_000)}
    message = r"File too large.* Needed: 0.400 MB .* untouched. Free some space or raise the quota"
    with file_size_limit(100_000), pytest.raises(CheckpointError, match=message):
        write(tmp_path, step=2, state=large, settings={})
    assert names(tmp_path) == ["step-000000000001"]
    assert find_newest(tmp_path).checkpoint == previous


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"could not write .*Check the permissions"):
        small(tmp_path / "file" / "run")


def test_the_same_step_with_the_same_content_is_kept_untouched(tmp_path):
    first = small(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in [first.path, *first.path.iterdir()]}
    assert small(tmp_path) == first
    after = {path: path.stat().st_mtime_ns for path in [first.path, *first.path.iterdir()]}
    assert after == before


def test_the_same_step_is_kept_if_only_the_files_of_its_data_have_other_times(tmp_path):
    def settings(time):
        files, kinds = {"rows.csv": [682, time]}, {"example[0]": "float32 of shape (2,)"}
        return {**SETTINGS, DATA: {"kinds": kinds, "files": files}}

    first = write(tmp_path, step=7, state=state(), settings=settings(1))
    assert write(tmp_path, step=7, state=state(), settings=settings(2)) == first
    with pytest.raises(CheckpointError, match=r"Settings that differ: seed\. Checkpoints are"):
        write(tmp_path, step=7, state=state(), settings={**settings(1), "seed": 1})


@pytest.mark.parametrize("changes", [{"state": state(2.0)}, {"settings": {"seed": 1}}])
def test_the_same_step_with_another_content_is_never_overwritten(tmp_path, changes):
    first = small(tmp_path)
    with pytest.raises(CheckpointError, match=rf"good checkpoint with digest {first.digest}"):
        write(tmp_path, **{"step": 7, "state": state(), "settings": SETTINGS, **changes})
    assert find_newest(tmp_path).checkpoint == first


def test_a_damaged_checkpoint_of_the_same_step_is_moved_aside_and_logged(tmp_path, caplog):
    for number in (1, 2):
        (small(tmp_path).path / "model.pt").write_bytes(b"damaged")
        checkpoint = small(tmp_path)
        assert verify(checkpoint.path) == checkpoint
        aside = tmp_path / f"step-000000000007.damaged-{number}"
        assert (aside / "model.pt").read_bytes() == b"damaged"
        assert f"moved a damaged checkpoint aside to {aside}" in caplog.text
    assert find_newest(tmp_path).refusals == ()


def list_steps(folder):
    return [int(name.removeprefix("step-")) for name in names(folder)]


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        small(tmp_path, step=step)
        assert list_steps(tmp_path) == [step - 1, step][-step:]
    small(tmp_path, step=6, keep=3)
    assert list_steps(tmp_path) == [4, 5, 6]


def test_a_damaged_one_does_not_count_as_one_kept(tmp_path, caplog):
    for step in (1, 2, 3):
        small(tmp_path, step=step, keep=3)
    (tmp_path / "step-000000000003" / "model.pt").unlink()
    small(tmp_path, step=4)
    assert list_steps(tmp_path) == [2, 3, 4]  # 2 is the only fallback that 4 has
    assert "does not count" in caplog.text


def test_newer_ones_are_left_when_a_run_goes_back(tmp_path):
    for step in (1, 2, 8, 9):
        small(tmp_path, step=step, keep=4)
    small(tmp_path, step=3)
    assert list_steps(tmp_path) == [2, 3, 8, 9]


def test_the_scan_goes_from_the_newest_to_the_first_that_verifies(tmp_path):
    for step in (1, 20, 1_000_000_000_000):
        small(tmp_path, step=step, keep=3)
    for name in ("step-0000000000099", "step-x", "step-000000000020.damaged-1"):
        (tmp_path / name).mkdir()  # not names that `write` gives
    (tmp_path / "step-1000000000000" / "model.pt").unlink()
    scan = find_newest(tmp_path)
    assert scan.checkpoint.step == 20
    assert [refused.path.name for refused in scan.refusals] == ["step-1000000000000"]
    explained = r"step-000000000020 is the newest that verifies.\n  refused: .*model.pt: missing"
    assert re.search(explained, scan.explain())


def test_a_folder_without_a_good_checkpoint_says_so(tmp_path):
    absent = find_newest(tmp_path / "absent")
    assert (absent.checkpoint, absent.refusals) == (None, ())
    assert absent.explain() == f"{tmp_path / 'absent'}: no checkpoint there."
    for step in (1, 2):
        (small(tmp_path, step=step).path / "manifest.json").unlink()
    scan = find_newest(tmp_path)
    assert scan.checkpoint is None
    assert [refused.path.name[-1] for refused in scan.refusals] == ["2", "1"]
    explained = r"no checkpoint verifies.(\n  refused: .*no manifest.*){2}\nRestore one from a copy"
    assert re.search(explained, scan.explain())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step is -1. It must be an integer of at least 0"),
        ({"step": True}, "step is True. It must be an integer of at least 0"),
        ({"keep": 1}, "keep is 1. It must be at least 2"),
        ({"state": {"../model": 1}}, r"key '../model'. .* lower-case"),
        ({"state": {"Model": 1}}, "key 'Model'. .* lower-case"),
        ({"state": {3: 1}}, "key 3. .* lower-case"),
        ({"state": {"model": {"a": object()}}}, r"state\['model'\]\['a'\] is a object"),
        ({"state": {"user": np.float64(1)}}, r"user.pt: .*found GLOBAL numpy.* convert it first"),
        ({"state": {"user": 1 << 3000}}, r"user.pt: .*found Unsupported operand"),
        ({"settings": {"sizes": (1, 2)}}, "Use lists in place of tuples, and str keys"),
        ({"settings": {1: 2}}, "Use lists in place of tuples, and str keys"),
        ({"settings": {"lr": float("nan")}}, "no plain JSON.*not JSON compliant"),
        ({"settings": {"path": Path()}}, "no plain JSON.*not JSON serializable"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_written(tmp_path, changes, message):
    previous = small(tmp_path, step=1)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, **{"step": 2, "state": state(), "settings": {}, **changes})
    assert names(tmp_path) == ["step-000000000001"]
    assert find_newest(tmp_path).checkpoint == previous
