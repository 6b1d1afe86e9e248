"""Strike a command, check how it ends, and check the result of its run once continued."""

import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torture_forks import ACTIONS, Ended, Strike, fork, import_all, start
from torture_targets import KILLS, SIGNALS, TARGETS, Target, contents, prepare

__all__ = ["Outcome", "Reference", "continue_run", "refer", "strike", "warm"]

ERRORS = {action: os.strerror(ACTIONS[action][1]) for action in ("EIO", "ENOSPC", "reading")}

LEFT_OUT = "the tracker TensorBoard failed in begin and is left out of this session"

WARM = """
import sys
from anybatch.cli import main
for line in {commands!r}:
    try:
        main(line)
    except SystemExit:
        pass
print("MODULES", *sys.modules)
"""


@dataclass
class Outcome:
    """Command that was struck, and its end."""

    target: str
    action: str
    number: int = 0  # of the call, from 1
    seconds: float | None = None  # until the strike, if it is not at a call
    second: int = 0  # call at which the continuing command was killed
    then: tuple[str, ...] = ()  # done before the run continued
    call: str = ""
    code: int = 0
    is_struck: bool = False
    has_written: bool = False  # whether the continuing command wrote a checkpoint
    continued: list[str] = field(default_factory=list)  # commands, and their exit codes
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Format a line for the record."""
        where = f"{self.number} {self.call}" if self.number else f"after {self.seconds:.3f} s"
        second = f" and {self.second}" if self.second else ", ".join(("", *self.then))
        ends = ", ".join((str(self.code), *self.continued))
        return f"{self.target} {self.action} {where}{second}: {ends}{self._format_problems()}"

    def _format_problems(self) -> str:
        return "".join(f"\n  {problem}" for problem in self.problems)


@dataclass(frozen=True)
class Reference:
    """Undisturbed command."""

    target: Target
    folder: Path  # before the command
    calls: list[str]
    reads: list[str]  # calls that open for reading or read
    contents: dict[str, Any]  # of the folder afterwards
    seconds: float


def warm(root: Path) -> None:
    """Import the modules of all commands, so that no child needs to."""
    folder = root / "warm"
    prepare(folder, TARGETS["train"])
    commands = [target.argv for target in TARGETS.values() if not target.argv[0].endswith(".py")]
    (folder / "warm.py").write_text(WARM.format(commands=[*commands, ["predict", "run"]]))
    import_all(fork(folder, ["warm.py"]).out.split("MODULES")[1])


def refer(root: Path, name: str, target: Target) -> Reference:
    """Run a command undisturbed."""
    before, folder = root / f"{name}-before", root / name
    prepare(before, target)
    shutil.copytree(before, folder)
    start_time = time.perf_counter()
    ended = fork(folder, target.argv)
    seconds = time.perf_counter() - start_time
    assert (ended.code, ended.err) == (0, ""), ended
    actual = contents(folder, target)
    assert actual["ok"], actual
    if name in ("verify", "evaluate"):
        assert ended.calls == [], ended  # they change nothing
    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    reads = fork(folder, target.argv, Strike("reading")).calls
    return Reference(target, before, ended.calls, reads, actual, seconds)


def strike(folder: Path, outcome: Outcome, reference: Reference) -> None:
    """Strike a command, check its end, and continue. Mistakes go into `problems`."""
    shutil.copytree(reference.folder, folder)
    run = start if outcome.target == "start" else fork
    ended = run(
        folder, reference.target.argv, Strike(outcome.action, outcome.number, outcome.seconds)
    )
    outcome.code, outcome.is_struck = ended.code, ended.is_struck
    if ended.is_struck and outcome.number:
        outcome.call = ended.calls[outcome.number - 1]
    _check_end(outcome, ended)
    _check_checkpoints(outcome, ended, reference, folder)
    if ended.code == 0:
        both = reference.contents, contents(folder, reference.target)
        _check_contents(outcome, *(_without_tracker(one, ended) for one in both))
    else:
        continue_run(outcome, reference, folder)


def continue_run(outcome: Outcome, reference: Reference, folder: Path) -> None:
    """Continue as a user would, and compare the final contents of the run."""
    if _try_to_continue(outcome, reference.target, folder):
        _check_contents(outcome, reference.contents, contents(folder, reference.target))


def _check_contents(outcome: Outcome, expected: dict[str, Any], actual: dict[str, Any]) -> None:
    """Compare the final contents of a run. Only extra checkpoints are allowed.

    A signal saves the current update. The next checkpoint removes leftovers.
    """
    if outcome.action in SIGNALS:
        actual["checkpoints"] = expected["checkpoints"]
    if not outcome.has_written:
        actual["checkpoints"] = [n for n in actual["checkpoints"] if n in expected["checkpoints"]]
        actual["names"] = [n for n in actual["names"] if n in expected["names"] or not _is_old(n)]
    if outcome.action == "reading":  # a repeated last step may no longer be the last
        expected, actual = _without_evaluations(expected), _without_evaluations(actual)
    for name, value in expected.items():
        if actual[name] != value:
            outcome.problems.append(f"{name} differ: {_difference(value, actual[name])}")


def _without_evaluations(actual: dict[str, Any]) -> dict[str, Any]:
    return actual | {"records": [row for row in actual["records"] if row["kind"] != "evaluation"]}


def _without_tracker(contents: dict[str, Any], ended: Ended) -> dict[str, Any]:
    """Leave out the folder of a tracker that the disk refused, if the command has warned of it.

    The run goes on without that tracker, since the records hold all numbers.
    """
    if LEFT_OUT not in " ".join(ended.err.split()):
        return contents
    return contents | {"names": [name for name in contents["names"] if name != "run/tensorboard"]}


def _is_old(name: str) -> bool:
    return re.match(r"run/checkpoints/step-\d{12}\.partial($|/)", name) is not None


def _check_end(outcome: Outcome, ended: Ended) -> None:
    """Check that a command ended as it should."""
    problems, action = outcome.problems, outcome.action
    last = ended.err.strip().rpartition("anybatch: ")[2]
    is_script = outcome.target in ("script", "control")
    # Before the command line handles signals, the interpreter ends in its own way.
    begins = re.search(r"/anybatch/(?!__init__|__main__|cli/__init__)", ended.err) is None
    is_python = outcome.seconds is not None and begins
    if "Traceback" in ended.err and not is_script and not is_python:
        problems.append(f"a traceback: {ended.err[-1500:]}")
    if action in KILLS:
        expected = {137 if ended.is_struck else 0}
    elif action in SIGNALS:
        expected = {0, 128 + ACTIONS[action][1]}
    else:
        expected = {0, 1 if is_script else 2}
        is_silent = ended.code == 0 and "/run/tensorboard" not in outcome.call
        if ERRORS[action] not in last and not is_silent:
            problems.append(f"the message does not name the error: {ended.err}")
    if ended.code not in expected:
        problems.append(f"ended with {ended.code}: {ended.err[-500:]}")


def _check_checkpoints(outcome: Outcome, ended: Ended, reference: Reference, folder: Path) -> None:
    """Check that `verify` finds no damage, and every finished checkpoint."""
    calls = ended.calls
    if outcome.number:
        calls = calls[: outcome.number - 1] + calls[outcome.number :]
    names = [p.name for p in (reference.folder / "run" / "checkpoints").glob("step-*")]
    names += [call for call in calls if call.startswith("rename /run/checkpoints/step-")]
    steps = [int(match[1]) for name in names if (match := re.search(r"step-(\d{12})$", name))]
    actual = fork(folder, ["verify", "run", "--json"])
    verified = json.loads(actual.out or "{}")
    message = verified.get("error", "")
    if actual.code and not re.search(r"no checkpoint yet|is no run", message):
        outcome.problems.append(f"verify: {actual.code}: {message or actual.err}")
    step = verified.get("step") or 0
    if step < max(steps, default=0):
        outcome.problems.append(f"lost checkpoint {max(steps)}, verify has {step}: {message}")


def _try_to_continue(outcome: Outcome, target: Target, folder: Path) -> bool:
    """Continue by the first command that can."""
    if target.makes is not None and (folder / target.makes).exists():
        return True  # `contents` tells whether it is whole
    ways = target.again or (target.argv,)
    ways = ways[:: -1 if outcome.number % 2 else 1]
    ways = (*ways[: 1 if outcome.second else 0], *ways)
    for number, argv in enumerate(ways):
        second = Strike("kill", outcome.second) if outcome.second and number == 0 else None
        ended = fork(folder, argv, second)
        outcome.continued.append(f"{argv[0]} {ended.code}")
        renamed = [call for call in ended.calls if call.startswith("rename /run/checkpoints/")]
        outcome.has_written = bool(renamed)
        if ended.code == 0:
            return True
    outcome.problems.append(f"cannot be continued: {ended.err[-1500:]}")
    return False


def _difference(expected: Any, actual: Any) -> str:
    if isinstance(expected, list) and isinstance(actual, list):
        missing = [item for item in expected if item not in actual]
        extra = [item for item in actual if item not in expected]
        return f"missing {missing[:3]}, unexpected {extra[:3]}, {len(expected)}, {len(actual)}"
    return f"it is {str(actual)[:300]} and should be {str(expected)[:300]}"
