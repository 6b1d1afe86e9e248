"""Kill runs, and change their data before they continue: every command must refuse.

    train, killed after its first checkpoint  ->  data changed   ->  a command that reads data
                                              ->  data restored  ->  resume  ->  the end

Each change is tried with each command. A refusal is exit code 2 with a message about other data,
and no change to a checkpoint, record or ledger of the run.
"""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from torture_forks import Strike, fork
from torture_runs import Outcome, Reference, continue_run

__all__ = ["plan_data", "strike_with_data"]

Lines = list[str]

CHANGES: dict[str, Callable[[Lines], Lines]] = {
    "one digit of one cell": lambda rows: [*rows[:17], _with_digit(rows[17]), *rows[18:]],
    "one target": lambda rows: [_with_target(rows[0]), *rows[1:]],
    "all values times 10": lambda rows: [",".join(_times_10(row)) for row in rows],
    "rows in reverse": lambda rows: rows[::-1],
    "two rows exchanged": lambda rows: [*rows[:4], rows[9], *rows[5:9], rows[4], *rows[10:]],
    "a row more": lambda rows: [*rows, rows[0]],
    "a row less": lambda rows: rows[:-1],
    "columns exchanged": lambda rows: [",".join([*row.split(",")[1::-1], row[-1]]) for row in rows],
}

COMMANDS = {
    "resume": ["resume", "run"],
    "resume for longer": ["resume", "run", "--set", "run.epochs=3"],
    "evaluate": ["evaluate", "run"],
    "predict": ["predict", "run"],
    "explain": ["explain", "run"],
    "export": ["export", "run"],
    "verify": ["verify", "run"],
    "examples": ["examples", "run"],
}


def plan_data(reference: Reference, chance: random.Random) -> list[Outcome]:
    """List each change with each command, after kills at calls drawn by chance."""
    first = next(
        number
        for number, call in enumerate(reference.calls, 1)
        if re.match(r"rename /run/checkpoints/step-\d{12}$", call)
    )
    return [
        Outcome(
            "data", "kill", chance.randint(first + 1, len(reference.calls)), then=(change, name)
        )
        for change in CHANGES
        for name in COMMANDS
    ]


def strike_with_data(folder: Path, outcome: Outcome, reference: Reference) -> None:
    """Kill a run, check that a command refuses other data, and continue with the true data."""
    change, name = outcome.then
    shutil.copytree(reference.folder, folder)
    ended = fork(folder, reference.target.argv, Strike("kill", outcome.number))
    outcome.code = ended.code
    data = folder / "rows.csv"
    header, *rows = data.read_text().splitlines()
    true = data.read_bytes()
    data.write_text("\n".join([header, *CHANGES[change](rows)]) + "\n")
    before = _files(folder)
    ended = fork(folder, COMMANDS[name])
    outcome.continued.append(f"{name} {ended.code}")
    if ended.code != 2 or "Traceback" in ended.err or "other data" not in ended.err:
        outcome.problems.append(f"{name} is not refused: {ended.code} {ended.out} {ended.err}")
    now = _files(folder)
    changed = [f for f in sorted({*before, *now}) if now.get(f) != before.get(f)]
    # Opening a killed run repairs it: leftovers go, and checksums are new.
    changed = [f for f in changed if not f.endswith(".partial") and f != "run/run.json"]
    if changed:
        outcome.problems.append(f"{name} has changed {changed}")
    data.write_bytes(true)
    continue_run(outcome, reference, folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _with_digit(row: str) -> str:
    """Return a row whose first number has another last digit."""
    first, rest = row.split(",", 1)
    return f"{first[:-1]}{(int(first[-1]) + 1) % 10},{rest}"


def _with_target(row: str) -> str:
    return row[:-1] + str(1 - int(row[-1]))


def _times_10(row: str) -> list[str]:
    *values, target = row.split(",")
    return [str(10 * float(value)) for value in values] + [target]
