"""Kill and interrupt commands, or fail their disk, at every call that changes a folder.

    strike train, resume, a script, ...  ->  verify  ->  resume, or train again  ->  the end

A command first runs undisturbed, as a reference. This counts its calls that change its folder: open
(for writing), write, fsync, rename, mkdir, unlink, close, truncate. Then it runs once for each call
and each of these actions:

    kill       SIGKILL before the call
    half       SIGKILL after half of a write
    EIO        the call fails, this once
    ENOSPC     the call fails, and each later one that needs space
    reading    a call that reads, or opens to read, fails once with EIO
    SIGTERM, SIGINT

Afterwards four things must hold. The command ended as it should: with one message that names the
disk's error and no traceback, or with exit code 143 or 130. `verify` finds no damage. No finished
checkpoint is lost. And the run, once continued, equals the reference: digest, records, ledger,
names of files.

    twice      kill, and kill again when the run continues
    times      SIGTERM and SIGINT after some time, in forked children
    start      the same in separate processes, which import torch first
    data       kill, and continue with other data, which must be refused (`torture_data.py`)
    control    a script with draws outside its run, which must give another result

Power cuts are not among these: what a call wrote stays.

    python benchmarks/torture.py [--runs N] [--seed 0] [--target NAME ...] [--action NAME ...]
                                 [--at-once 1] [--minutes M] [--json] [--write]

`--runs` draws that many of all by chance, plus the controls. It needs Linux and a C compiler, `cc`.
"""

import argparse
import gc
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torture_forks import ACTIONS, preload

preload()  # before torch is imported

from machine import write  # noqa: E402
from torture_data import plan_data, strike_with_data  # noqa: E402
from torture_runs import Outcome, Reference, refer, strike, warm  # noqa: E402
from torture_targets import KILLS, SIGNALS, TARGETS  # noqa: E402

NUM_TWICE, NUM_TIMES, NUM_STARTS = 60, 10, 8


IS_CHECKPOINT = re.compile(r"rename /run/checkpoints/step-\d{12}$")


def plan(name: str, reference: Reference, chance: random.Random) -> list[Outcome]:
    """List everything to do to a target."""
    target, num_calls = TARGETS[name], len(reference.calls)
    outcomes = [
        Outcome(name, action, number)
        for action in target.actions
        for number, call in enumerate(
            reference.reads if action == "reading" else reference.calls, 1
        )
        if target.only in call and (action != "half" or call.startswith("write "))
    ]
    if name == "train":
        outcomes += plan_starts()
        draws = [sorted(chance.choices(range(1, num_calls), k=2)) for _ in range(NUM_TWICE)]
        outcomes += [Outcome("twice", "kill", first, second=second) for second, first in draws]
    if name == "data":
        return plan_data(reference, chance)
    if name == "control":
        renames = [i for i, call in enumerate(reference.calls) if IS_CHECKPOINT.match(call)]
        return chance.sample(outcomes[renames[0] + 1 : renames[1]], 5)
    if not name.endswith("script"):
        for action in SIGNALS:
            for part in range(NUM_TIMES):
                outcomes.append(Outcome(name, action, seconds=reference.seconds * part / NUM_TIMES))
    return outcomes


def plan_starts(seconds: float = 4.0) -> list[Outcome]:
    """List the moments at which a process that still imports torch gets a signal."""
    return [
        Outcome("start", action, seconds=seconds * part / NUM_STARTS)
        for action in SIGNALS
        for part in range(NUM_STARTS)
    ]


def run_outcome(root: Path, references: dict[str, Reference], outcome: Outcome) -> Outcome:
    """Do one of the planned things to a target."""
    reference = references.get(outcome.target, references["train"])
    with tempfile.TemporaryDirectory(dir=root) as place:
        do = strike_with_data if outcome.target == "data" else strike
        do(Path(place) / "struck", outcome, reference)
    return outcome


def summarise(outcomes: list[Outcome]) -> dict[str, Any]:
    """Count the runs, and those that went wrong."""
    wrong = [o for o in outcomes if bool(o.problems) != (o.target == "control")]
    return {
        "runs": len(outcomes),
        "as expected": len(outcomes) - len(wrong),
        "by target": dict(Counter(o.target for o in outcomes)),
        "by action": dict(Counter(o.action for o in outcomes)),
        "by call": dict(Counter(o.call.split()[0] for o in outcomes if o.call)),
        "wrong": dict(Counter(o.target for o in wrong)),
    }


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, help="number, drawn by chance; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after this time; kills come first")
    parser.add_argument("--at-once", type=int, default=1, help="processes")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--action", nargs="*", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--write", action="store_true", help="write the raw record")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    start, chance = time.monotonic(), random.Random(args.seed)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where fsync takes no time
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory) as place:
        root = Path(place)
        warm(root)
        gc.freeze()  # or else each child copies what its collector looks at
        names = {"train", *args.target}
        references = {name: refer(root, name, TARGETS[name]) for name in TARGETS if name in names}
        outcomes = [o for name in args.target for o in plan(name, references[name], chance)]
        outcomes = [o for o in outcomes if o.action in args.action]
        chance.shuffle(outcomes)
        planned = len(outcomes)
        controls = [o for o in outcomes if o.target == "control"]
        others = [o for o in outcomes if o.target != "control"][: args.runs]
        outcomes = controls + sorted(others, key=lambda o: o.action not in KILLS)
        do = partial(run_outcome, root, references)
        done = []
        with get_context("fork").Pool(args.at_once) as pool:
            for number, outcome in enumerate(pool.imap(do, outcomes), 1):
                done.append(outcome)
                print(f"{number}/{len(outcomes)}", end="\r", file=sys.stderr)
                if outcome.problems and outcome.target != "control":
                    print(outcome, flush=True)
                if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
                    break
    summary = {"planned": planned} | summarise(done)
    summary |= {"seconds": round(time.monotonic() - start), "at once": args.at_once}
    print(json.dumps(summary) if args.json else summary)
    if args.write:
        print(write("torture", {"summary": summary, "runs": [str(o) for o in done]}))
    sys.exit(summary["as expected"] < summary["runs"])


if __name__ == "__main__":
    main()
