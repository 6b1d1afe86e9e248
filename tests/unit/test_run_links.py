"""Links, pipes and the like in the folder of a run are refused at once.

Oracle: what lies outside of the run, byte for byte as before; and the path in the message.
"""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

import anybatch as ab
from anybatch.errors import AnybatchError, RunError
from anybatch.runs import checkpoints
from anybatch.runs.disk import replace_file
from anybatch.runs.records import read_records
from command_line import anybatch, files_of, refuse, run_command, write_recipe
from small_training import train_small
from test_recipe_runs import resume_run, start_run

KEYS = {"run.epochs": 2, "observe.norms": True}
CHECKPOINT = "checkpoints/step-000000000012"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a ledger and two checkpoints."""
    folder = tmp_path_factory.mktemp("links") / "run"
    start_run(folder, **KEYS)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def move(path: Path, outside: Path) -> Path:
    """Put a link in the place of a file or folder, which goes elsewhere; where to."""
    target = outside / path.name
    outside.mkdir(exist_ok=True)
    if path.exists():
        path.rename(target)
    elif path.suffix:
        target.write_text("somebody else's")
    else:
        target.mkdir()
    path.symlink_to(target)
    return target


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "recipe.toml", "records.jsonl", "lock", "ledger", "checkpoints", CHECKPOINT),
        *("ledger/steps-000000000000-000000000006.parquet", "run.json.partial"),
        *("recipe.toml.partial", "records.jsonl.partial", "checkpoints/step-000000000018.partial"),
    ],
)
def test_a_link_is_refused_and_what_it_leads_to_untouched(
    run: Path, tmp_path: Path, name: str
) -> None:
    target = move(run / name, tmp_path / "outside")
    before = files_of(tmp_path)
    with pytest.raises(AnybatchError, match=rf"{name} is a link to {target}\. It must be"):
        resume_run(run, "run.epochs=3")
    assert files_of(tmp_path) == before


@pytest.mark.fast(1)
@pytest.mark.parametrize("name", ["tensorboard", "mlflow.db", "wandb"])
def test_a_link_in_the_place_of_what_a_tracker_writes_is_refused(
    run: Path, tmp_path: Path, name: str
) -> None:
    target = move(run / name, tmp_path / "outside")
    before = files_of(tmp_path)
    tracker = name.removesuffix(".db")
    with pytest.raises(RunError, match=rf"{name} is a link to {target}"):
        resume_run(run, "run.epochs=3", f"track.to=['{tracker}']")
    assert files_of(tmp_path) == before
    resume_run(run, "run.epochs=3")  # which writes nothing there


@pytest.mark.parametrize("name", ["lock", "records.jsonl"])
def test_a_file_with_another_name_is_not_changed_in_place(
    run: Path, tmp_path: Path, name: str
) -> None:
    os.link(run / name, tmp_path / "backup")
    before = files_of(tmp_path)
    with pytest.raises(RunError, match=rf"{name} is one file under 2 names .*cp -p"):
        resume_run(run, "run.epochs=3")
    assert files_of(tmp_path) == before


def test_a_file_with_another_name_that_is_replaced_leaves_the_other(
    run: Path, tmp_path: Path
) -> None:
    linked = [run / "run.json", run / "recipe.toml", *run.glob("ledger/*")]
    linked += run.glob("checkpoints/step-000000000006/*")
    for number, file in enumerate(linked):
        os.link(file, tmp_path / f"backup-{number}")
    before = [file.read_bytes() for file in linked]
    resume_run(run, "run.epochs=3")
    backups = [(tmp_path / f"backup-{number}").read_bytes() for number in range(len(linked))]
    assert backups == before
    assert not (run / "checkpoints/step-000000000006").exists()  # it was superseded


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


@pytest.mark.fast(5)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("make", "kind"), [(pipe, "a named pipe"), (listening, "a socket")])
@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "recipe.toml", "records.jsonl", "lock", "checkpoints", CHECKPOINT, "ledger"),
        *(f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/model.pt", "records.jsonl.partial"),
        "ledger/steps-000000000000-000000000006.parquet",
    ],
)
def test_what_is_no_file_is_named_at_once_by_every_command(
    run: Path, name: str, make: object, kind: str
) -> None:
    path, began = run / name, time.monotonic()
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)  # type: ignore[operator]
    for command in ("show", "runs"):
        assert anybatch(command, run).code in (0, 2)
    results = anybatch("verify", run).err  # without a word of what the next session would replace
    expected = f"{run} is no run" if name == "run.json" else str(path)
    assert expected in results or name == "records.jsonl.partial"
    if name.startswith(f"{CHECKPOINT}/"):  # the checkpoint before it is taken
        assert f"{name} is {kind}" in results
    elif name != "run.json":
        assert f"{name} is {kind}" in refuse("resume", run, "--set", "run.epochs=3")
    assert time.monotonic() - began < 60  # and not for ever


def test_a_folder_in_the_place_of_a_file_is_named(run: Path) -> None:
    for name in ("records.jsonl", "recipe.toml"):
        (run / name).rename(run / "aside")
        (run / name).mkdir()
        assert f"{name} is a folder. It must be a plain file" in refuse("resume", run)
        (run / name).rmdir()
        (run / "aside").rename(run / name)
    run_command("resume", run)  # the control


def test_a_run_may_be_reached_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    resume_run(tmp_path / "link", "run.epochs=3")
    run_command("verify", tmp_path / "link")
    (tmp_path / "runs").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "runs")
    start_run(tmp_path / "other" / "new")
    assert run_command("verify", tmp_path / "runs" / "new", "--json").report["step"] == 6


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("export", "model.safetensors"),
        ("export", "model.safetensors.partial"),
        ("explain --step 6", "explain-step-6.html"),
    ],
)
def test_outputs_that_commands_write_by_default_follow_no_link(
    run: Path, tmp_path: Path, command: str, name: str
) -> None:
    (tmp_path / "outside").write_text("years of work")
    (run / name).symlink_to(tmp_path / "outside")
    command, *options = command.split()
    assert name in refuse(command, run, *options)
    (tmp_path / "outside").unlink()  # a link that leads nowhere is one, too
    assert name in refuse(command, run, *options)
    assert not (tmp_path / "outside").exists()


def test_a_link_that_comes_while_the_run_trains_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()

    def plant(_: object, step: ab.Step) -> None:
        if step.step == 0:
            (tmp_path / "run" / "checkpoints").symlink_to(outside)

    with pytest.raises(RunError, match=rf"checkpoints is a link to {outside}"):
        train_small(tmp_path / "run", plant)
    assert list(outside.iterdir()) == []


def test_a_damaged_checkpoint_that_is_a_link_is_not_removed_through_it(tmp_path: Path) -> None:
    state = {"model": {}}
    for step in (1, 2):
        checkpoints.write(tmp_path / "c", step=step, state=state, settings={})
    target = move(tmp_path / "c/step-000000000001", tmp_path / "outside")
    before = files_of(target)
    with pytest.raises(RunError, match="step-000000000001 is a link"):
        checkpoints.write(tmp_path / "c", step=3, state=state, settings={})
    assert files_of(target) == before


def test_a_plain_write_would_go_through_the_link(tmp_path: Path) -> None:
    """Control: the classic way to append, and to replace by way of another name."""
    (tmp_path / "outside").write_text("a")
    for name in ("records.jsonl", "run.json.partial"):
        (tmp_path / name).symlink_to(tmp_path / "outside")
        with (tmp_path / name).open("a") as file:
            file.write("b")
    assert (tmp_path / "outside").read_text() == "abb"
    for act in (
        lambda: read_records(tmp_path / "records.jsonl"),
        lambda: replace_file(tmp_path / "run.json", ["c"]),
    ):
        with pytest.raises(RunError, match="is a link to"):
            act()
    assert (tmp_path / "outside").read_text() == "abb"


# A run that was stopped as it was made


PARTS = ("lock", "run.json", "recipe.toml.partial", "records.jsonl", "run.json.partial")


@pytest.mark.fast(3)
@pytest.mark.parametrize("mark", ["now", '{"format": 1, "anybatch": "0.1.0"}\n'])
@pytest.mark.parametrize("num_parts", range(len(PARTS) + 1))
def test_a_run_that_was_stopped_as_it_was_made_begins_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, num_parts: int
) -> None:
    monkeypatch.chdir(tmp_path)
    half_made = tmp_path / "begun"
    half_made.mkdir()
    for part in PARTS[:num_parts]:
        (half_made / part).touch()
    if num_parts > 1:
        ab.Run(tmp_path / "empty").close()
        text = (tmp_path / "empty/run.json").read_text() if mark == "now" else mark
        (half_made / "run.json").write_text(text)
        results = refuse("resume", half_made)
        assert f"start again: anybatch train RECIPE --out {half_made}" in results
    run_command("train", write_recipe(tmp_path), "--out", half_made)
    run_command("verify", half_made)
    assert "is a run already" in refuse("train", tmp_path / "recipe.toml", "--out", half_made)


@pytest.mark.parametrize("name", ["recipe.toml", "notes.txt", "model.partial", "checkpoints"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for part in ("lock", name):
        (folder / part).write_text("years of work")
    before = files_of(tmp_path)
    with pytest.raises(RunError, match="exists and is no run"):
        start_run(folder)
    assert files_of(tmp_path) == before


def test_a_run_that_has_records_is_not_begun_again(tmp_path: Path) -> None:
    run = ab.Run(tmp_path / "run")
    run.record({"kind": "note", "step": 0})
    run.close()
    before = files_of(tmp_path)
    with pytest.raises(RunError, match="is a run already, and is not written over"):
        start_run(tmp_path / "run")
    assert files_of(tmp_path) == before
