"""Damage to any file of a run is named by `anybatch verify`.

Oracle: the test itself has damaged the file, and knows its path. Controls: an untouched copy is
result to be whole, and without its checksums most of the damage goes unseen.
"""

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import anybatch as ab
from anybatch.recipe.results import verify_run
from anybatch.recipe.runs import check_run
from anybatch.runs import checksums
from anybatch.runs.checksums import Checksums
from command_line import anybatch, refuse
from small_training import train_small
from test_recipe_runs import resume_run, start_run

KEYS = {"run.epochs": 2, "observe.norms": True, "track.smoothing": 0.5}
FLIPS = (0.0, 0.13, 0.5, 0.77, 1.0)  # places in a file, from its first byte to its last


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two sessions, that run after the first of them, and a run from another seed."""
    root = tmp_path_factory.mktemp("runs")
    result = {name: root / name for name in ("run", "older", "other")}
    start_run(result["run"], **KEYS)
    shutil.copytree(result["run"], result["older"])
    resume_run(result["run"], "run.epochs=3")
    start_run(result["other"], **KEYS | {"run.seed": 5})
    return result


def files(run: Path) -> list[Path]:
    """All files of a run, as paths in it."""
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())


def damage(run: Path) -> str:
    """Return the damage that verify reports."""
    if not (run / "run.json").exists():
        return refuse("verify", run)
    return str(verify_run(run).get("error", ""))


@pytest.fixture
def copies(tmp_path: Path, runs: dict[str, Path]) -> Iterator[Path]:
    """Fresh copies of the run, one after the other."""

    def fresh() -> Iterator[Path]:
        while True:
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            yield Path(shutil.copytree(runs["run"], tmp_path / "copy"))

    return fresh()


def flip(file: Path, place: float, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def flips(run: Path) -> list[tuple[Path, float, int]]:
    """A few bits of each file that has any."""
    some = [file for file in files(run) if (run / file).stat().st_size]
    return [
        (file, place, (3 * i + j) % 8)
        for i, file in enumerate(some)
        for j, place in enumerate(FLIPS)
    ]


def test_a_run_with_a_ledger_evaluations_and_checkpoints_verifies(runs: dict[str, Path]) -> None:
    names = {str(file) for file in files(runs["run"])}
    assert {"run.json", "recipe.toml", "records.jsonl", "lock"} < names
    assert sum(name.endswith("manifest.json") for name in names) == 2
    assert sum(name.startswith("ledger/") for name in names) == 3
    assert '"evaluation"' in (runs["run"] / "records.jsonl").read_text()
    for run in runs.values():
        assert damage(run) == ""


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_named(runs: dict[str, Path], copies: Iterator[Path]) -> None:
    cases = flips(runs["run"])
    for file, place, bit in cases:
        copy = next(copies)
        flip(copy / file, place, bit)
        assert str(copy / file) in damage(copy), (file, place, bit)
    print(f"\n{len(cases)} flipped bits in {len({case[0] for case in cases})} files: all named")
    assert len(cases) > 100


def test_without_checksums_most_flips_outside_of_checkpoints_are_not_seen(  # the control
    runs: dict[str, Path], copies: Iterator[Path]
) -> None:
    counter = Counter()
    for file, place, bit in flips(runs["run"]):
        if file.name != "run.json" and file.parts[0] != "checkpoints":
            copy = next(copies)
            (copy / "run.json").write_text('{"format": 1, "anybatch": "0.1.0"}\n')
            flip(copy / file, place, bit)
            counter[str(copy / file) in damage(copy)] += 1
    assert counter[False] > 2 * counter[True]


@pytest.mark.slow
def test_any_file_that_is_deleted_is_named(runs: dict[str, Path], copies: Iterator[Path]) -> None:
    for file in files(runs["run"]):
        copy = next(copies)
        (copy / file).unlink()
        assert str(file) in damage(copy), file
        assert str(copy) in damage(copy), file
    print(f"\n{len(files(runs['run']))} deleted files: all named")


@pytest.mark.parametrize("folder", ["checkpoints/step-000000000018", "checkpoints", "ledger"])
def test_a_folder_that_is_deleted_is_named(copies: Iterator[Path], folder: str) -> None:
    copy = next(copies)
    shutil.rmtree(copy / folder)
    assert f"{copy / folder}/" in damage(copy)


@pytest.mark.slow
def test_two_files_that_are_swapped_are_named(
    runs: dict[str, Path], copies: Iterator[Path]
) -> None:
    listed, num_swaps = files(runs["run"]), 0
    for distance in (1, 7):
        for one, other in zip(listed, listed[distance:] + listed[:distance], strict=True):
            copy = next(copies)
            contents = [(copy / name).read_bytes() for name in (one, other)]
            (copy / one).write_bytes(contents[1])
            (copy / other).write_bytes(contents[0])
            messages = damage(copy)
            same = contents[0] == contents[1]
            assert same or str(copy / one) in messages or str(copy / other) in messages, (
                one,
                other,
            )
            num_swaps += not same
    print(f"\n{num_swaps} pairs of files swapped: all named")
    assert num_swaps > 40


@pytest.mark.parametrize("source", ["older", "other"])
def test_a_file_of_an_earlier_time_or_of_another_run_is_named(
    runs: dict[str, Path], copies: Iterator[Path], source: str
) -> None:
    num_exchanged = 0
    for file in {*files(runs["run"])} & {*files(runs[source])}:
        content = (runs[source] / file).read_bytes()
        if content != (runs["run"] / file).read_bytes():
            copy = next(copies)
            (copy / file).write_bytes(content)
            assert str(file) in damage(copy), file
            num_exchanged += 1
    print(f"\n{num_exchanged} files exchanged for those of the {source} run: all named")
    assert num_exchanged >= 3


@pytest.mark.fast(1)
@pytest.mark.parametrize("name", ["foreign", "records.jsonl.bak", ".hidden", "x.partial"])
def test_a_foreign_file_in_any_folder_is_named(copies: Iterator[Path], name: str) -> None:
    run = next(copies)
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    for place in [folder.relative_to(run) for folder in folders]:
        copy = next(copies)
        (copy / place / name).write_text("foreign")
        assert str(copy / place / name) in damage(copy), place
    assert len(folders) == 5


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (
            "ledger/steps-000000000000-000000000006.parquet",
            "steps-000000000030-000000000036.parquet",
        ),
        ("checkpoints/step-000000000018", "step-000000000012"),
        ("checkpoints/step-000000000018", "notes"),
        ("ledger", "ledger-2"),
    ],
)
def test_a_copy_of_something_of_the_run_is_foreign(
    copies: Iterator[Path], source: str, name: str
) -> None:
    copy = next(copies)
    place = (copy / source).parent / name
    if (copy / source).is_dir():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(copy / source, place)
    else:
        shutil.copy(copy / source, place)
    assert str(place) in damage(copy)


def test_the_command_ends_with_2_and_one_line_for_each_file(copies: Iterator[Path]) -> None:
    copy = next(copies)
    flip(copy / "records.jsonl", 0.5, 1)
    flip(copy / "ledger/steps-000000000000-000000000006.parquet", 0.5, 1)
    ended = anybatch("verify", copy, "--json")
    assert ended.code == 2
    lines = ended.report["error"].splitlines()
    assert [line.split()[0] for line in lines] == [
        f"{copy}/ledger/steps-000000000000-000000000006.parquet",
        f"{copy}/records.jsonl",
    ]


def test_what_may_change_is_no_damage(copies: Iterator[Path]) -> None:
    copy = next(copies)
    resume_run(copy, "run.epochs=4", "track.smoothing=0.9")
    assert damage(copy) == ""
    assert "smoothing = 0.9" in (copy / "recipe.toml").read_text()


def test_rows_since_the_last_checkpoint_are_no_damage_and_said_to_be_unchecked(
    copies: Iterator[Path],
) -> None:
    copy = next(copies)
    with (copy / "records.jsonl").open("a") as file:
        file.write('{"kind": "note", "step": 18}\n{"kind": "no')
    result = verify_run(copy)
    assert result["ok"]
    assert result["unchecked"] == ["1 rows of records.jsonl, written since the last checkpoint"]
    resume_run(copy, "run.epochs=4")
    assert verify_run(copy)["ok"]
    assert "unchecked" not in verify_run(copy)


def test_a_run_of_before_there_were_checksums_says_so_and_gets_them_on_resume(
    copies: Iterator[Path],
) -> None:
    copy = next(copies)
    (copy / "run.json").write_text('{"format": 1, "anybatch": "0.0.9"}\n')
    result = verify_run(copy)
    assert result["ok"]
    assert result["unchecked"] == [
        "all but the checkpoints: anybatch 0.0.9 wrote no checksums of it"
    ]
    resume_run(copy, "run.epochs=4")
    assert verify_run(copy)["ok"]
    assert "unchecked" not in verify_run(copy)
    assert json.loads((copy / "run.json").read_text())["anybatch"] == "0.0.9"
    flip(copy / "ledger/steps-000000000000-000000000006.parquet", 0.5, 1)
    assert "steps-000000000000-000000000006.parquet" in damage(copy)


def test_what_others_write_while_the_run_is_open_is_unchecked_and_what_comes_later_foreign(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"

    def plotting(_: object, step: ab.Step) -> None:
        (run / "plots").mkdir(exist_ok=True)
        (run / "plots" / f"{step.step}.png").write_bytes(b"PNG")

    train_small(run, plotting)
    (run / "model.safetensors").write_bytes(b"")  # as 'anybatch export' does
    result = verify_run(run)
    assert result["ok"]
    assert result["unchecked"] == ["model.safetensors", "plots"]
    (run / "notes").touch()
    assert f"{run}/notes is no file of this run" in damage(run)
    train_small(run, epochs=4)
    assert damage(run) == ""


# What resume does with damage


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted", "older"])
def test_resume_tells_of_damaged_records_and_keeps_them(
    runs: dict[str, Path],
    copies: Iterator[Path],
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    copy = next(copies)
    file, damaged_copy = copy / "records.jsonl", copy / "records.jsonl.damaged-1"
    whole = file.read_bytes()
    if how == "flipped":
        at = whole.index(b'"loss": ') + 11
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif how == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "deleted":
        file.unlink()
    else:
        shutil.copy(runs["older"] / "records.jsonl", file)
    before = file.read_bytes() if file.exists() else None
    resume_run(copy, "run.epochs=4")
    assert f"{file} is not as the run wrote it" in caplog.text
    assert (damaged_copy.read_bytes() if damaged_copy.exists() else None) == before
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (messages,) = (row["damaged"] for row in rows if "damaged" in row)
    assert messages[0].startswith(f"{file} is not as the run wrote it")
    assert verify_run(copy)["ok"]


@pytest.mark.parametrize("name", ["records.jsonl", "recipe.toml"])
def test_a_file_that_the_disk_cannot_read_is_not_taken_for_damaged(
    copies: Iterator[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    copy = next(copies)
    read = checksums.read_file_state

    def fail(path: Path, at_most: int | None = None) -> object:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, at_most)

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "read_file_state", fail)
        assert "Input/output error" in refuse("resume", copy, "--set", "run.epochs=4")
        assert f"Input/output error: '{copy}/{name}'" in damage(copy)  # verify names it
    assert list(copy.glob("records.jsonl.damaged-*")) == []
    resume_run(copy, "run.epochs=4")
    assert damage(copy) == ""


def test_resume_leaves_a_damaged_ledger_file_and_verify_still_names_it(
    copies: Iterator[Path],
) -> None:
    copy = next(copies)
    file = copy / "ledger/steps-000000000006-000000000012.parquet"
    flip(file, 0.5, 1)
    before = file.read_bytes()
    resume_run(copy, "run.epochs=4")
    assert file.read_bytes() == before
    assert str(file) in damage(copy)
    assert "is not as the run wrote it" in refuse("examples", copy)


def test_a_recipe_edited_by_hand_is_told_and_taken(
    copies: Iterator[Path], caplog: pytest.LogCaptureFixture
) -> None:
    copy = next(copies)
    file = copy / "recipe.toml"
    file.write_text(file.read_text().replace("epochs = 3", "epochs = 4"))
    assert str(file) in damage(copy)
    assert len(resume_run(copy)) == 6
    assert f"{file} is not as the run wrote it" in caplog.text
    assert damage(copy) == ""


def test_a_damaged_mark_is_refused_with_a_way_out(copies: Iterator[Path]) -> None:
    copy = next(copies)
    flip(copy / "run.json", 0.5, 1)
    message = refuse("resume", copy)
    assert f"{copy}/run.json is damaged" in message
    assert 'Without one, write {"format": 1} into it' in message
    (copy / "run.json").write_text('{"format": 1}')
    check_run(copy)
    resume_run(copy, "run.epochs=4")
    assert damage(copy) == ""


def test_a_run_that_goes_on_while_it_is_verified_is_no_damage(
    copies: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = next(copies)
    find, calls = Checksums.find_damage, []

    def resume_meanwhile(checksums: Checksums, *names: object) -> list[str]:
        calls.append(names)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(Checksums, "find_damage", find)
                resume_run(copy, "run.epochs=4")
        return find(checksums, *names)

    monkeypatch.setattr(Checksums, "find_damage", resume_meanwhile)
    assert verify_run(copy)["ok"]
    assert len(calls) == 2
