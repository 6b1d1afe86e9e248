"""Kill runs and continue them on another number of ranks, until they reach the end.

    run:  attempt on 1 .. 4 ranks, kill -> attempt on 1 .. 4 ranks, kill -> ... -> the end

An attempt ends by SIGKILL to all of its processes at a random moment, to one rank at a random
moment, or to the first rank while it writes a checkpoint. After each attempt, the newest checkpoint
that verifies must be no older than the one before. If only one rank was killed, the others must end
by themselves within `PATIENCE`. Between attempts, the data change on all ranks or on one: every
rank must refuse them. In the end, the checkpoint must have the digest of an undisturbed run in one
process. Every tenth run is that of `anybatch train --ranks N` and `anybatch resume`; the others are
forked from here, so that torch is imported once.

    python benchmarks/torture_ranks.py [--runs 200] [--seed 0] [--at-once 2] [--write]
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first update imports it; here, once for all forks

from anybatch.runs import checkpoints
from machine import write
from torture_training import NUM_EVENTS, RECIPE, die_at, train_as_rank

KINDS = ("all", "one", "checkpoint")
PATIENCE = 20.0
"""Seconds within which the other ranks must end after one was killed."""


@dataclass
class Attempt:
    """Attempt to run to the end."""

    ranks: int
    kill: str | None  # which processes, of `KINDS`; "data": other data; None: no kill
    at: float  # seconds, or for "checkpoint" the number of the event
    took_effect: bool = True  # whether the kill came before the end
    alone: float | None = None  # seconds until the other ranks ended
    changed: list[int] = field(default_factory=list)  # ranks with other data
    step: int = 0  # of the newest checkpoint that verifies afterwards


@dataclass
class Torture:
    """Run with its attempts."""

    seed: int
    by_command: bool
    attempts: list[Attempt] = field(default_factory=list)
    digest: str = ""
    problems: list[str] = field(default_factory=list)


def torture_run(expected: dict[bool, str], seconds: dict[bool, float], seed: int) -> Torture:
    """Kill a run one to three times, and then let it end."""
    chance = random.Random(seed)
    run = Torture(seed, by_command=seed % 10 == 9)
    kills: list[str | None] = [chance.choice(KINDS) for _ in range(chance.randint(1, 3))]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        for kill in [*kills, None]:
            ranks = chance.randint(1, 4)
            if kill == "one":
                ranks = max(ranks, 2)
            if run.by_command and kill == "checkpoint":
                kill = "all"
            earliest = 0.4 if run.by_command else 0.0  # a command takes long to start
            at = chance.uniform(earliest, 1 + ranks / 4) * seconds[run.by_command]
            if kill == "checkpoint":
                at = chance.randint(1, NUM_EVENTS)
            attempt = Attempt(ranks, kill, at)
            run.attempts.append(attempt)
            (run_command if run.by_command else run_forked)(folder, attempt, run, chance)
            read_checkpoint(folder, run)
            if attempt.step and not run.by_command and chance.random() < 0.3:
                refuse_data(folder, run, chance)
    if run.digest != expected[run.by_command]:
        run.problems.append(f"ended with {run.digest}, not {expected[run.by_command]}")
    return run


def refuse_data(folder: Path, run: Torture, chance: random.Random) -> None:
    """Start a run with other data, on all ranks or on one, and see that every rank refuses."""
    ranks = chance.randint(1, 4)
    changed = chance.choice([list(range(ranks)), [chance.randrange(ranks)]])
    attempt = Attempt(ranks, "data", 0.0, changed=changed)
    output = folder.parent / "output"
    size = output.stat().st_size
    run.attempts.append(attempt)
    run_forked(folder, attempt, run, chance)
    read_checkpoint(folder, run)
    message = output.read_bytes()[size:].decode()
    if attempt.step != run.attempts[-2].step or not re.search("other data|begins with", message):
        run.problems.append(f"other data are not refused: {asdict(attempt)}: {message[-1000:]}")


def read_checkpoint(folder: Path, run: Torture) -> None:
    """Read the newest checkpoint of an attempt."""
    scan = checkpoints.find_newest(folder / "checkpoints")
    attempt, before = run.attempts[-1], max((a.step for a in run.attempts[:-1]), default=0)
    attempt.step = 0 if scan.checkpoint is None else scan.checkpoint.step
    run.digest = "" if scan.checkpoint is None else scan.checkpoint.digest
    if attempt.step < before or scan.refusals:
        run.problems.append(f"checkpoint {before} before, {attempt.step} now: {scan.explain()}")


def run_forked(folder: Path, attempt: Attempt, run: Torture, chance: random.Random) -> None:
    """Make an attempt whose ranks are forked from this process."""
    with tempfile.TemporaryDirectory() as meeting:
        store = f"file://{meeting}/store"
        pids = [_fork(folder, rank, attempt, store) for rank in range(attempt.ranks)]
        victims = [chance.choice(pids)] if attempt.kill == "one" else pids
        _wait_for_end(pids, victims, attempt, run)


def _fork(folder: Path, rank: int, attempt: Attempt, store: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with (folder.parent / "output").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if attempt.kill == "checkpoint" and rank == 0:
            die_at(int(attempt.at))
        train_as_rank(folder, rank, attempt.ranks, store, is_changed=rank in attempt.changed)
        code = 0
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def run_command(folder: Path, attempt: Attempt, run: Torture, chance: random.Random) -> None:
    """Make an attempt by the command line."""
    begins = not (folder / "recipe.toml").is_file()
    command = ["train", *RECIPE, "--out", str(folder)] if begins else ["resume", str(folder)]
    command = [sys.executable, "-m", "anybatch", *command, "--ranks", str(attempt.ranks)]
    with (folder.parent / "output").open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    _wait_for_end([process.pid], [process.pid], attempt, run, ranks=attempt.ranks)


def _wait_for_end(
    pids: list[int], victims: list[int], attempt: Attempt, run: Torture, ranks: int = 0
) -> None:
    """Wait for the end, and kill when it is time."""
    codes: dict[int, int] = {}
    start = time.monotonic()
    killed_at = None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        now = time.monotonic()
        if attempt.kill in ("all", "one") and killed_at is None and now - start > attempt.at:
            killed_at = now
            if ranks and attempt.kill == "one":
                victims = _list_descendants(pids[0])[:1]
            elif ranks:
                victims = [*_list_descendants(pids[0]), *pids]
            for pid in victims:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        if killed_at is None and codes and len(codes) < len(pids):
            killed_at = now  # the first rank ended by itself
        waited = now - (killed_at or start)
        if waited > (PATIENCE if killed_at else 300):
            run.problems.append(f"hangs: {asdict(attempt)}")
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitpid(pid, 0)[1]
        time.sleep(0.005)
    attempt.took_effect = any(codes.values())
    if attempt.kill == "data" and not all(codes.values()):
        run.problems.append(f"other data are not refused: {asdict(attempt)}, {codes}")
    if attempt.kill == "one" and attempt.took_effect and killed_at:
        attempt.alone = round(time.monotonic() - killed_at, 3)
    if attempt.kill is None and attempt.took_effect:
        run.problems.append(f"failed: {asdict(attempt)}, exit codes {sorted(codes.values())}")


def _list_descendants(pid: int) -> list[int]:
    """List the living descendants of a process, the youngest generation first."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
        except OSError:  # it ended just now
            continue
    descendants, todo = [], [pid]
    while todo:
        below = [child for child, parent in parents.items() if parent in todo]
        descendants += below
        todo = below
    return descendants[::-1]


def run_reference(by_command: bool) -> tuple[str, float]:
    """Return the digest of an undisturbed run in one process, and its seconds."""
    run = Torture(0, by_command)
    with tempfile.TemporaryDirectory() as root:
        folder, start = Path(root) / "run", time.monotonic()
        run.attempts.append(Attempt(1, None, 0))
        (run_command if by_command else run_forked)(folder, run.attempts[0], run, random.Random(0))
        seconds = time.monotonic() - start
        read_checkpoint(folder, run)
        assert not run.problems, run.problems
    return run.digest, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the raw record")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    results = {by_command: run_reference(by_command) for by_command in (False, True)}
    expected, seconds = ({key: one[i] for key, one in results.items()} for i in (0, 1))
    seeds = range(args.seed, args.seed + args.runs)
    with ThreadPoolExecutor(args.at_once) as pool:
        runs = []
        for run in pool.map(partial(torture_run, expected, seconds), seeds):
            runs.append(run)
            print(run.seed, [(a.ranks, a.kill, a.step) for a in run.attempts], run.problems or "")
    counts = summarise(runs)
    print(counts)
    if args.write:
        record: dict[str, Any] = {"summary": counts, "expected": expected, "seconds": seconds}
        print(write("torture_ranks", {**record, "runs": [asdict(run) for run in runs]}))
    sys.exit(counts["same digest"] != len(runs))


def summarise(runs: list[Torture]) -> dict[str, Any]:
    """Count the results of all runs."""
    attempts = [attempt for run in runs for attempt in run.attempts]
    return {
        "runs": len(runs),
        "same digest": sum(not run.problems for run in runs),
        "by command": sum(run.by_command for run in runs),
        "kills": dict(Counter(a.kill for a in attempts if a.kill and a.took_effect)),
        "longest that others went on after a rank": max(
            (a.alone or 0 for a in attempts), default=0
        ),
    }


if __name__ == "__main__":
    main()
