"""A mistake of the user's ends in one message on stderr and exit code 2, and writes nothing."""

import errno
import fcntl
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from anybatch.cli import main
from anybatch.cli.mistakes import describe_error
from command_line import (
    RECIPE,
    STEPS_AN_EPOCH,
    anybatch,
    files_of,
    refuse,
    run_command,
    write_module,
    write_recipe,
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train_once(*more: object) -> Path:
    """A run of one epoch."""
    run_command("train", write_recipe(Path()), "--out", "run", *more)
    return Path("run")


def read_training_refusal(**sections: dict[str, object]) -> str:
    """Return the message for a recipe that cannot be trained, which leaves nothing behind."""
    recipe = write_recipe(Path(), **sections)
    before = files_of(Path())
    message = refuse("train", recipe)
    assert not Path("runs").exists()
    assert files_of(Path()) == before
    return message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": {"name": "mlp"}}, "modle: no such key; did you mean 'model'?"),
        ({"run": {"epoch": 3}}, "run.epoch: no such key; did you mean 'epochs'?"),
        ({"batch": {"size": "64"}}, "batch.size: expected an integer, got '64'."),
        ({"batch": {"size": 5000}}, "batch_size is 5000. It must be at most num_examples, 1438"),
        ({"batch": {"micro_batch": 0}}, "batch.micro_batch: expected at least 1 or 'auto', got 0"),
        ({"optimizer": {"lr": None}}, "optimizer.lr: missing. Every recipe needs it."),
        ({"optimizer": {"lr": -0.1}}, "optimizer.lr: expected a number above 0, got -0.1."),
        ({"optimizer": {"name": "sdg"}}, "there is no optimizer 'sdg'; did you mean 'sgd'?"),
        ({"model": {"name": "lenett"}}, "no model 'lenett'; did you mean 'lenet'?"),
        ({"model": {"args": {"clases": 10}}}, "model.args.clases: no such argument; did you mean"),
        (
            {"model": {"args": {"classes": "x"}}},
            "model.args.classes = 'x' is text. It should be an integer",
        ),
        (
            {"model": {"args": {"inputs": [63]}}},
            "does not take the inputs of examples of shapes (1, 8, 8) and ()",
        ),
        ({"model": {"args": {"classes": 9}}}, "The label of example 9 is 9. Labels must be 0 to 8"),
        ({"data": {"name": "digit"}}, "no data set 'digit'; did you mean 'digits'?"),
        ({"data": {"held_out": 1e-6}}, "leaves 1797 to train on and 0 held out"),
        ({"data": {"name": "npz", "args": {"path": "no.npz"}}}, "no.npz is no file"),
        ({"objective": {"loss": "cross_entrpy"}}, "did you mean 'cross_entropy'?"),
        ({"objective": {"loss": "squared_error"}}, "predictions of shape (2, 10) and targets"),
        ({"objective": {"grain": 0}}, "objective.grain: expected at least 1, got 0."),
        ({"run": {"device": "gpu"}}, "run.device 'gpu' cannot be used here"),
        ({"run": {"seed": 2**64}}, "seed is 18446744073709551616. It must be less than 2^64"),
    ],
)
def test_a_wrong_recipe_is_refused_before_there_is_a_run(
    sections: dict[str, dict[str, object]], message: str
) -> None:
    assert message in read_training_refusal(**sections)


def test_a_batch_larger_than_the_data_may_carry_on() -> None:
    carry = ("--set", "batch.size=1500", "--set", "batch.last=carry", "--set", "run.epochs=3")
    assert run_command("train", write_recipe(Path()), *carry, "--json").report["step"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.toml", "there is no recipe 'missing.toml'"),
        ("lenet-digit", "did you mean 'lenet-digits'?"),
        ("folder", "there is no recipe 'folder'"),
        ("no.toml", "no.toml is not TOML"),
        ("bytes.toml", "bytes.toml is not TOML"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(name: str, message: str) -> None:
    Path("folder").mkdir()
    Path("no.toml").write_text("[model\nname = 3")
    Path("bytes.toml").write_bytes(b"\xff\xfe\x00")
    assert message in refuse("train", name)
    assert not Path("runs").exists()


def test_a_run_in_place_of_a_recipe_is_told_apart() -> None:
    train_once()
    assert "To continue the run: anybatch resume run" in refuse("train", "run")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("evaluate", "run", "--split", "test"),
            "'test' is not one of 'train', 'validation', 'held_out'",
        ),
        (
            ("predict", "run", "--split", "test"),
            "'test' is not one of 'train', 'validation', 'held_out'",
        ),
        (("verify", "run", "--jsn"), "No such option"),
        (("evaluate",), "Missing argument"),
        (("trian", "run"), "No such command 'trian'"),
    ],
)
def test_a_mistyped_command_is_refused(command: tuple[str, ...], message: str) -> None:
    ended = anybatch(*command)
    assert ended.code == 2
    assert message in " ".join(ended.err.replace("│", " ").split())


@pytest.mark.parametrize("command", ["resume", "evaluate", "predict", "export", "verify"])
def test_what_is_no_run_is_refused(command: str) -> None:
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    for folder in ("nowhere", "other", "other/notes.txt"):
        assert f"{folder} is no run. Expected a folder that" in refuse(command, folder)
    assert files_of(Path()) == {"other/notes.txt": b"mine"}


def test_folders_and_files_that_exist_are_never_written_over() -> None:
    train_once()
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    before = files_of(Path())
    recipe = Path("recipe.toml")
    assert "run is a run already" in refuse("train", recipe, "--out", "run")
    assert "exists and is no run" in refuse("train", recipe, "--out", "other")
    assert "exists and is no run" in refuse("train", recipe, "--out", "other/notes.txt")
    for command in ("predict", "export"):
        assert "not written over" in refuse(command, "run", "--out", "other/notes.txt")
        assert "nowhere is no folder" in refuse(command, "run", "--out", "nowhere/file")
    assert files_of(Path()) == before
    run_command("export", "run")
    assert "model.safetensors exists" in refuse("export", "run")


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("file").write_text("mine")
    message = refuse("train", write_recipe(Path()), "--out", "file/run")
    assert "file/run" in message
    assert Path("file").read_text() == "mine"


def test_a_key_that_changes_arithmetic_cannot_change_on_resume() -> None:
    train_once()
    before = files_of(Path("run"))
    message = refuse("resume", "run", "--set", "optimizer.lr=0.1")
    assert "optimizer.lr is 0.5 in this run and cannot become 0.1" in message
    assert "run.epochs" in message
    assert "did you mean 'epochs'?" in refuse("resume", "run", "--set", "run.epoch=3")
    assert files_of(Path("run")) == before


def test_a_run_whose_recipe_was_edited_is_refused() -> None:
    recipe = train_once() / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("lr = 0.5", "lr = 0.25"))
    for command in ("resume", "evaluate", "predict", "export", "verify"):
        ended = anybatch(command, "run")
        assert ended.code == 2
        assert "recipe.toml is not the recipe that step-000000000006 was made with" in ended.err


def test_two_processes_cannot_train_one_run() -> None:
    run = train_once()
    before = files_of(run)
    with (run / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refuse("resume", "run", "--set", "run.epochs=2")
        assert "writes into run. Only one may" in message
        assert files_of(run) == before
        assert run_command("verify", "run", "--json").report["ok"] is True
    run_command("resume", "run", "--set", "run.epochs=2")


def test_a_run_without_a_checkpoint_can_only_be_resumed() -> None:
    run = train_once()
    whole = run_command("verify", "run", "--json").report["digest"]
    checkpoint = run / "checkpoints" / "step-000000000006"
    checkpoint.rename("away")
    for command in ("evaluate", "predict", "export"):
        assert "no checkpoint there" in refuse(command, "run")
    assert "no checkpoint yet" in anybatch("verify", "run").err
    run_command("resume", "run")
    assert run_command("verify", "run", "--json").report["digest"] == whole


@pytest.mark.slow
def test_any_flipped_byte_of_a_checkpoint_is_found() -> None:
    checkpoint = train_once() / "checkpoints" / "step-000000000006"
    rng = np.random.default_rng(0)
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *rng.integers(len(whole), size=10).tolist()}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            ended = anybatch("verify", "run", "--json")
            assert (ended.code, ended.report["ok"]) == (2, False)
            assert file.name in ended.err
        for command in ("evaluate", "resume", "predict", "export"):
            assert file.name in refuse(command, "run")
        file.write_bytes(whole)
    assert run_command("verify", "run", "--json").report["ok"] is True  # control: all is well again


def test_damage_to_the_newest_checkpoint_is_told_and_the_one_before_is_used() -> None:
    run = train_once("--set", "run.epochs=2")
    weights = run / "checkpoints" / "step-000000000012" / "model.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = anybatch("evaluate", "run", "--json")
    assert (ended.code, ended.report["step"]) == (0, STEPS_AN_EPOCH)
    assert "truncated" in ended.err
    assert anybatch("verify", "run").code == 2


def test_a_checkpoint_from_elsewhere_is_refused() -> None:
    run = train_once()
    run_command("train", "recipe.toml", "--set", "optimizer.lr=0.1", "--out", "other")
    checkpoints = run / "checkpoints"
    (checkpoints / "step-000000000006").rename("away")
    Path("other/checkpoints/step-000000000006").rename(checkpoints / "step-000000000006")
    assert "not the recipe that" in refuse("evaluate", "run")
    foreign = checkpoints / "step-000000000007"
    foreign.mkdir()
    foreign.joinpath("model.pt").write_bytes(b"weights of somebody's")
    assert "foreign: no manifest" in anybatch("verify", "run").err


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """A disk that is full as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_once_there_is_room() -> None:
    train_once("--set", "run.epochs=1")
    before = run_command("verify", "run", "--json").report
    with no_file_larger_than(2000):
        message = refuse("resume", "run", "--set", "run.epochs=3")
    assert "could not write run/" in message
    assert "File too large" in message
    assert run_command("verify", "run", "--json").report == before
    run_command("resume", "run", "--set", "run.epochs=3")
    run_command("train", "recipe.toml", "--set", "run.epochs=3", "--out", "whole")
    digests = [run_command("verify", r, "--json").report["digest"] for r in ("run", "whole")]
    assert digests[0] == digests[1]


def test_a_full_disk_leaves_no_half_of_a_file() -> None:
    train_once()
    with no_file_larger_than(2000):
        assert "File too large" in refuse("export", "run")
        assert "File too large" in refuse("predict", "run", "--out", "rows")
    assert not [path for path in Path().rglob("*") if path.name.startswith(("model.saf", "rows"))]


def test_output_that_cannot_be_written_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    train_once()
    with (
        open("/dev/full", "w") as full,
        redirect_stdout(full),
        pytest.raises(SystemExit, match="2"),
    ):
        main(["predict", "run"])
    message = capsys.readouterr().err
    assert message.startswith("anybatch: No space left on device.")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (MemoryError("512 GB"), "batch.micro_batch"),
    ],
)
def test_errors_of_the_machine_are_explained(error: Exception, message: str) -> None:
    assert message in str(describe_error(error))


def test_a_defect_of_the_library_keeps_its_traceback() -> None:
    recipe = write_recipe(Path())
    defect = mock.patch("anybatch.recipe.build.steps", side_effect=RuntimeError("a defect"))
    with defect, pytest.raises(RuntimeError, match="a defect"):
        anybatch("train", recipe)
    assert describe_error(RuntimeError("a defect")) is None
    assert not list(Path("runs").iterdir())


def npz(**arrays: object) -> dict[str, dict[str, object]]:
    """A recipe for arrays of one's own, ten inputs wide and with three classes."""
    np.savez("data.npz", **{"inputs": np.eye(30, 10), "targets": np.arange(30) % 3} | arrays)
    return {
        "data": {"name": "npz", "args": {"path": "data.npz"}},
        "model": {"args": {"inputs": [10], "classes": 3}},
        "batch": {"size": 8},
    }


def with_nan() -> np.ndarray:
    inputs = np.eye(30, 10)
    inputs[17, 3] = np.nan
    return inputs


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"targets": np.arange(30) % 4}, "The label of example 3 is 3. Labels must be 0 to 2"),
        ({"targets": np.arange(30) % 3 - 1}, "The label of example 0 is -1. Labels must be 0 to 2"),
        ({"targets": np.arange(30) % 3 * 1.0}, "Class labels are float32 of shape (30,)"),
        ({"targets": np.eye(3)[np.arange(30) % 3].astype(int)}, "are int64 of shape (30, 3)"),
        ({"targets": np.arange(29) % 3}, "30 inputs and 29 targets"),
        ({"targets": np.array(["a", "b", "c"] * 10)}, "targets are <U1 of shape (30,)"),
        ({"targets": np.full(30, 2**63, np.uint64)}, "Integers must be below 2^63"),
        ({"inputs": with_nan()}, "inputs hold nan in example 17"),
        ({"inputs": np.full((30, 10), 1e300)}, "torch.float32 cannot hold it"),
        ({"inputs": np.zeros((0, 10)), "targets": np.zeros(0, int)}, "The data set is empty"),
        ({"inputs": np.array([{}] * 30)}, "arrays of objects are never unpickled"),
    ],
)
def test_wrong_data_are_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    assert message in read_training_refusal(**npz(**arrays))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint64, np.bool_])
def test_integer_labels_of_any_width_are_the_same(dtype: type) -> None:
    digests = set()
    for number, width in enumerate((np.int64, dtype)):
        recipe = write_recipe(Path(), **npz(targets=(np.arange(30) % 2).astype(width)))
        run_command("train", recipe, "--out", f"run-{number}")
        digests.add(run_command("verify", f"run-{number}", "--json").report["digest"])
    assert len(digests) == 1


def test_a_finite_loss_that_grows_without_end_is_reported_with_the_rate() -> None:
    recipe = write_recipe(Path(), run={"epochs": 50, "threads": 1}, optimizer={"lr": 1e7})
    message = refuse("train", recipe, "--out", "run")
    assert "the loss grew from 2." in message
    assert "The learning rate was 1e+07: try a lower optimizer.lr" in message
    assert Path("run/records.jsonl").read_text().count('"step"') > 1


def test_a_loss_that_is_no_number_names_the_examples_and_keeps_the_checkpoint() -> None:
    write_module(
        Path.cwd(),
        "spoilt",
        "import torch.nn.functional as F\n"
        "calls = 0\n"
        "def losses(model, batch):\n"
        "    global calls\n"
        "    calls += len(batch[0]) in (256, 158)\n"
        "    values = F.cross_entropy(model(batch[0]), batch[1], reduction='none')\n"
        "    return values * (float('nan') if calls > 9 else 1.0)\n",
    )
    recipe = write_recipe(Path(), objective={"loss": "spoilt:losses"}, run={"epochs": 4})
    message = refuse("train", recipe, "--out", "run")
    assert "Not finite for 256 of 256 examples, by id: " in message
    assert "The checkpoint after 6 updates is kept in run." in message
    assert run_command("verify", "run", "--json").report["step"] == 6


def test_the_small_recipe_is_fine() -> None:  # the control of this file
    assert run_command("train", write_recipe(Path(), **RECIPE), "--json").report["complete"] is True
