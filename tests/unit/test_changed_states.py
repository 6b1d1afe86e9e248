"""Checkpoints that somebody has changed and sealed again, and tensors whose elements share memory.

Oracles: torch's own isfinite and equal; the size of a tensor by hand.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from anybatch.errors import AnybatchError, CheckpointError
from anybatch.recipe.results import verify_run
from anybatch.runs import checkpoints
from anybatch.runs.digest import digest_run
from anybatch.runs.manifest import StoredFile, format_manifest
from command_line import refuse
from small_training import start
from test_recipe_runs import resume_run, start_run

NEWEST = "checkpoints/step-000000000012"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed") / "run"
    start_run(folder, **{"run.epochs": 2})
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the state of a checkpoint, and make its manifest fit."""
    checkpoint = checkpoints.verify(path)
    state = {file.name[:-3]: torch.load(path / file.name) for file in checkpoint.files}
    change(state)
    shutil.rmtree(path)
    path.mkdir()
    files = []
    for name, value in sorted(state.items()):
        torch.save(value, path / f"{name}.pt")
        data = (path / f"{name}.pt").read_bytes()
        stored = StoredFile(name=f"{name}.pt", num_bytes=len(data), sha256=sha256(data).hexdigest())
        files.append(stored)
    forged = replace(checkpoint, files=tuple(files), digest=digest_run(state))
    (path / "manifest.json").write_bytes(format_manifest(forged))


def weight(state: dict[str, Any]) -> torch.Tensor:
    """Return the first weight of a model."""
    result = next(iter(state["model"].values()))
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.fast(3)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", ["verify", "resume", "evaluate", "predict", "export"])
def test_weights_that_are_not_finite_are_named(run: Path, command: str, value: float) -> None:
    reseal(run / NEWEST, lambda state: weight(state).view(-1)[:3].fill_(value))
    more = ["--set", "run.epochs=3"] if command == "resume" else []
    messages = refuse(command, run, *more)
    assert "holds 3 infinite or NaN values out of 640" in messages
    assert f"{run / NEWEST} was changed after it was written. Move it away" in messages
    (run / NEWEST).rename(run.parent / "aside")
    assert resume_run(run)[0].step.step == 6  # as the message says: from the checkpoint before it


def test_a_finite_weight_that_was_changed_is_named_by_verify_and_told_by_resume(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Control: the seal of the forger is right, and the checksum of the manifest alone differs."""
    reseal(run / NEWEST, lambda state: weight(state).add_(1))
    assert checkpoints.load(checkpoints.verify(run / NEWEST))
    assert f"{run / NEWEST}/manifest.json is not as the run wrote it" in verify_run(run)["error"]
    resume_run(run, "run.epochs=3")
    assert f"{run / NEWEST} is not as run.json lists it, and the run goes on" in caplog.text


PARTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "model.pt is missing or holds no dict": lambda state: state.pop("model"),
    "optimizer.pt is missing or holds no dict": lambda state: state.update(optimizer=[1]),
    "user.pt is missing or holds no dict": lambda state: state.pop("user"),
    "loss_scale.pt is missing or holds no dict": lambda state: state.update(loss_scale=None),
    "reduction.pt is missing or holds no dict": lambda state: state.pop("reduction"),
}


@pytest.mark.parametrize("message", PARTS)
def test_a_state_that_lacks_a_part_is_named(run: Path, message: str) -> None:
    reseal(run / NEWEST, PARTS[message])
    for command in ("verify", "resume", "evaluate"):
        assert message in refuse(command, run)


MISFITS: list[Callable[[dict[str, Any]], object]] = [
    lambda state: state.update(body={}),
    lambda state: state.update(body=[1]),
    lambda state: state.update(generators={"torch": None}),
    lambda state: state.update(optimizer={"state": {}, "param_groups": "none"}),
    lambda state: state.update(optimizer={"state": {7: {"x": torch.ones(2)}}, "param_groups": []}),
    lambda state: state.update(loss_scale={"value": "large"}),
    lambda state: state["loss_scale"].update(value=float("nan")),
    lambda state: state["model"].update(more=torch.ones(1)),
    lambda state: state["model"].update({next(iter(state["model"])): torch.ones(3)}),
    lambda state: state["model"].update({next(iter(state["model"])): "text"}),
    lambda state: state["model"].clear(),
]


@pytest.mark.fast(8)
@pytest.mark.parametrize("change", MISFITS)
@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_state_that_does_not_fit_is_refused(
    run: Path, change: Callable[[dict[str, Any]], object], command: str
) -> None:
    reseal(run / NEWEST, change)
    messages = refuse(command, run)
    assert "the checkpoint does not fit this model and optimiser" in messages
    assert "Build them as they were when the run began" in messages


# Expanded tensors


def expand_buffer() -> dict[str, Any]:
    """Tensors that repeat their elements, and one that does not."""
    row = torch.arange(3.0)
    return {
        "rows": row.expand(4, 3),
        "one": [torch.ones(1).expand(5), (torch.tensor(2.0).expand(2, 2), "text")],
        "windows": torch.arange(5).as_strided((3, 3), (1, 1)),
        "plain": row.reshape(3, 1).t(),
    }


def test_expanded_tensors_come_back_with_memory_of_their_own(tmp_path: Path) -> None:
    state = {"user": expand_buffer()}
    result = checkpoints.load(checkpoints.write(tmp_path, step=1, state=state, settings={}))["user"]
    for mine, theirs in (
        (result["rows"], state["user"]["rows"]),
        (result["one"][0], state["user"]["one"][0]),
        (result["one"][1][0], state["user"]["one"][1][0]),
        (result["windows"], state["user"]["windows"]),
        (result["plain"], state["user"]["plain"]),
    ):
        assert torch.equal(mine, theirs)
        mine.add_(1)  # torch refuses it where elements share memory
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        state["user"]["rows"].add_(1)  # the control


@pytest.mark.parametrize("shape", [(2**20, 2**20), (2**50,)])
def test_a_few_bytes_that_would_fill_the_memory_are_refused(
    run: Path, shape: tuple[int, ...]
) -> None:
    path = run / NEWEST
    checkpoint = checkpoints.verify(path)
    torch.save({"0.weight": torch.zeros(1).expand(shape)}, path / "model.pt")
    data = (path / "model.pt").read_bytes()
    assert len(data) < 5000
    stored = StoredFile(name="model.pt", num_bytes=len(data), sha256=sha256(data).hexdigest())
    others = tuple(file for file in checkpoint.files if file.name != "model.pt")
    (path / "manifest.json").write_bytes(
        format_manifest(replace(checkpoint, files=(*others, stored)))
    )
    message = "is an expanded tensor of shape .* apart they would take .* GB"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(checkpoints.verify(path))
    for command in ("verify", "resume", "evaluate"):
        assert "is an expanded tensor of shape" in refuse(command, run)


@pytest.mark.slow
def test_a_state_that_could_not_be_loaded_again_is_not_written(tmp_path: Path) -> None:
    state = {"user": {"x": torch.zeros(1, dtype=torch.int8).expand(2**32 + 1)}}
    with pytest.raises(AnybatchError, match=r"state\['x'\] is an expanded tensor"):
        checkpoints.write(tmp_path, step=1, state=state, settings={})
    assert list(tmp_path.iterdir()) == []


def test_a_training_goes_on_with_a_buffer_that_was_expanded(tmp_path: Path) -> None:
    def loop(epochs: int) -> Any:
        training = start()
        training.model.register_buffer("mask", torch.ones(1).expand(4))
        list(training.loop(tmp_path / "run", epochs=epochs))
        return training

    loop(1)
    assert torch.equal(loop(2).model.mask, torch.ones(4))
