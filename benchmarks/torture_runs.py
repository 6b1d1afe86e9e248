"""One command that is struck, what must be true of its end, and what the run ends with after it."""

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
    """One command that was struck, and what came of it."""

    target: str
    action: str
    number: int = 0  # of the call, from 1
    seconds: float | None = None  # after which it was struck, where it was not at a call
    second: int = 0  # call at which the command that continues was killed in its turn
    then: tuple[str, ...] = ()  # what was done afterwards, before the command was continued
    call: str = ""
    code: int = 0
    is_struck: bool = False
    has_written: bool = False  # whether a checkpoint was written by the command that continued
    continued: list[str] = field(default_factory=list)  # commands, and their exit codes
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for the record."""
        where = f"{self.number} {self.call}" if self.number else f"after {self.seconds:.3f} s"
        second = f" and {self.second}" if self.second else ", ".join(("", *self.then))
        ends = ", ".join((str(self.code), *self.continued))
        return f"{self.target} {self.action} {where}{second}: {ends}{self._described()}"

    def _described(self) -> str:
        return "".join(f"\n  {problem}" for problem in self.problems)


@dataclass(frozen=True)
class Reference:
    """A command that nothing struck."""

    target: Target
    folder: Path  # as it was before
    calls: list[str]
    reads: list[str]  # calls that open for reading, and read
    contents: dict[str, Any]  # of the folder afterwards
    seconds: float


def warm(root: Path) -> None:
    """Import what the commands import, so that no child has to."""
    folder = root / "warm"
    prepare(folder, TARGETS["train"])
    commands = [target.argv for target in TARGETS.values() if not target.argv[0].endswith(".py")]
    (folder / "warm.py").write_text(WARM.format(commands=[*commands, ["predict", "run"]]))
    import_all(fork(folder, ["warm.py"]).out.split("MODULES")[1])


def refer(root: Path, name: str, target: Target) -> Reference:
    """Run a command that nothing strikes."""
    before, folder = root / f"{name}-before", root / name
    prepare(before, target)
    shutil.copytree(before, folder)
    begun = time.perf_counter()
    ended = fork(folder, target.argv)
    seconds = time.perf_counter() - begun
    assert (ended.code, ended.err) == (0, ""), ended
    found = contents(folder, target)
    assert found["ok"], found
    if name in ("verify", "evaluate"):
        assert ended.calls == [], ended  # they change nothing
    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    reads = fork(folder, target.argv, Strike("reading")).calls
    return Reference(target, before, ended.calls, reads, found, seconds)


def strike(folder: Path, outcome: Outcome, reference: Reference) -> None:
    """Strike a command, see how it ends, and continue; what is wrong goes into `problems`."""
    shutil.copytree(reference.folder, folder)
    run = start if outcome.target == "start" else fork
    ended = run(
        folder, reference.target.argv, Strike(outcome.action, outcome.number, outcome.seconds)
    )
    outcome.code, outcome.is_struck = ended.code, ended.is_struck
    if ended.is_struck and outcome.number:
        outcome.call = ended.calls[outcome.number - 1]
    _check_end(outcome, ended)
    _check_kept(outcome, ended, reference, folder)
    if ended.code == 0:
        both = reference.contents, contents(folder, reference.target)
        _check_contents(outcome, *(_without_tracker(one, ended) for one in both))
    else:
        continue_run(outcome, reference, folder)


def continue_run(outcome: Outcome, reference: Reference, folder: Path) -> None:
    """Continue as a user would, and compare what the run ends with."""
    if _goes_on(outcome, reference.target, folder):
        _check_contents(outcome, reference.contents, contents(folder, reference.target))


def _check_contents(outcome: Outcome, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare what a run has ended with; only checkpoints may be more than those expected.

    A signal saves the update at hand. What could not be removed goes with the next checkpoint.
    """
    if outcome.action in SIGNALS:
        found["checkpoints"] = expected["checkpoints"]
    if not outcome.has_written:
        found["checkpoints"] = [n for n in found["checkpoints"] if n in expected["checkpoints"]]
        found["names"] = [n for n in found["names"] if n in expected["names"] or not _is_old(n)]
    if outcome.action == "reading":  # a last step that is made again may not be the last any more
        expected, found = _without_evaluations(expected), _without_evaluations(found)
    for name, value in expected.items():
        if found[name] != value:
            outcome.problems.append(f"{name} differ: {_difference(value, found[name])}")


def _without_evaluations(found: dict[str, Any]) -> dict[str, Any]:
    return found | {"records": [row for row in found["records"] if row["kind"] != "evaluation"]}


def _without_tracker(found: dict[str, Any], ended: Ended) -> dict[str, Any]:
    """Leave out the folder of a tracker that the disk refused, if the command has warned of it.

    The run goes on without that tracker, since the records hold all numbers.
    """
    if LEFT_OUT not in " ".join(ended.err.split()):
        return found
    return found | {"names": [name for name in found["names"] if name != "run/tensorboard"]}


def _is_old(name: str) -> bool:
    return re.match(r"run/checkpoints/step-\d{12}\.partial($|/)", name) is not None


def _check_end(outcome: Outcome, ended: Ended) -> None:
    """See that a command ended as it should."""
    problems, action = outcome.problems, outcome.action
    last = ended.err.strip().rpartition("anybatch: ")[2]
    is_script = outcome.target in ("script", "control")
    # Before the command line takes care of signals, the interpreter ends in its own way.
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


def _check_kept(outcome: Outcome, ended: Ended, reference: Reference, folder: Path) -> None:
    """See that `verify` finds no damage, and every checkpoint that was finished."""
    calls = ended.calls
    if outcome.number:
        calls = calls[: outcome.number - 1] + calls[outcome.number :]
    names = [p.name for p in (reference.folder / "run" / "checkpoints").glob("step-*")]
    names += [call for call in calls if call.startswith("rename /run/checkpoints/step-")]
    steps = [int(match[1]) for name in names if (match := re.search(r"step-(\d{12})$", name))]
    found = fork(folder, ["verify", "run", "--json"])
    verified = json.loads(found.out or "{}")
    said = verified.get("error", "")
    if found.code and not re.search(r"no checkpoint yet|is no run", said):
        outcome.problems.append(f"verify: {found.code}: {said or found.err}")
    step = verified.get("step") or 0
    if step < max(steps, default=0):
        outcome.problems.append(f"lost checkpoint {max(steps)}, verify has {step}: {said}")


def _goes_on(outcome: Outcome, target: Target, folder: Path) -> bool:
    """Continue; the first of the commands that can do it does."""
    if target.makes is not None and (folder / target.makes).exists():
        return True  # as a whole, or `contents` will tell
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


def _difference(expected: Any, found: Any) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        missing = [item for item in expected if item not in found]
        extra = [item for item in found if item not in expected]
        return f"missing {missing[:3]}, unexpected {extra[:3]}, {len(expected)}, {len(found)}"
    return f"expected {str(expected)[:300]}, found {str(found)[:300]}"
