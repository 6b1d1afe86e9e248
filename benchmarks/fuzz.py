"""Read a million damaged and hostile inputs: each is accepted, or refused by an AnybatchError.

    python benchmarks/fuzz.py [--inputs 1000000] [--seed 0] [--target NAME] [--write]

Input i of a target depends only on the seed, the target and i. Worker processes read the inputs, a
stripe each, and the main process watches them. A traceback is any other exception, a hang is an
input that takes longer than LIMIT seconds, and a crash is a process that ends. The record has the
number of each failure, so that `--target NAME --only i` repeats it.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from traceback import extract_tb
from typing import Any

import torch

from anybatch.errors import AnybatchError
from fuzz_targets import TARGETS, Target
from machine import write

LIMIT = 10.0  # seconds that an input may take
MOST_FAILURES = 20  # of a target, in full
AT, SINCE, READ, REFUSED, FAILED, SLOWEST = range(6)  # places in the progress of a worker


@dataclass
class Outcome:
    """Counts of the inputs of a target."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    crashes: int = 0
    slowest_seconds: float = 0.0
    seconds: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)


def read_one(target: Target, number: int, seed: int, folder: Path, sound: dict[str, bytes]) -> None:
    """Write one damaged input and read it.

    Raises:
        AnybatchError: it is refused.
    """
    random = Random(f"{seed} {target.name} {number}")
    for name in (*target.files, *target.rewritten):
        (folder / name).write_bytes(sound[name])
    name = random.choice(target.files)
    (folder / name).write_bytes(target.mutate(sound[name], random))
    target.seal(folder)
    target.read(folder)


def sound_files(target: Target, folder: Path) -> dict[str, bytes]:
    """Make a sound input, check that it can be read, and return its files."""
    target.sound(folder)
    outcome = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    target.read(folder)
    return outcome


def work(
    target: Target, numbers: range, seed: int, sound: dict[str, bytes], progress: Any, failures: Any
) -> None:
    """Read inputs, and update the progress after each."""
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="anybatch-fuzz-", dir=root))
    for name, content in sound.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        for number in numbers:
            progress[AT], progress[SINCE] = number, time.monotonic()
            try:
                read_one(target, number, seed, folder, sound)
                progress[READ] += 1
            except AnybatchError:
                progress[REFUSED] += 1
            except Exception as error:
                progress[FAILED] += 1
                if progress[FAILED] <= MOST_FAILURES:
                    failures.send(describe(number, error))
            progress[SLOWEST] = max(progress[SLOWEST], time.monotonic() - progress[SINCE])
        progress[AT] = -1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe(number: int, error: BaseException) -> dict[str, Any]:
    """Describe a traceback in one entry."""
    places = [
        f"{Path(at.filename).name}:{at.lineno}" for at in extract_tb(error.__traceback__)[-4:]
    ]
    text = f"{type(error).__name__}: {error}"[:200]
    return {"kind": "traceback", "input": number, "error": ascii(text), "places": places}


class Worker:
    """Process and its stripe of inputs."""

    def __init__(self, target: Target, numbers: range, seed: int, sound: dict[str, bytes]) -> None:
        self.target, self.numbers, self.seed, self.sound = target, numbers, seed, sound
        context = multiprocessing.get_context("fork")
        self.progress = context.RawArray("d", 6)
        self.progress[AT] = numbers.start
        self.progress[SINCE] = time.monotonic() + 30  # a worker needs time to start
        self.failures, sending = context.Pipe(duplex=False)
        arguments = (target, numbers, seed, sound, self.progress, sending)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()
        sending.close()

    def update(self, outcome: Outcome) -> "Worker | bool | None":
        """Read the progress of the process.

        Returns:
            True while it runs. After a hang or crash, a worker for the rest of the stripe. None at
            the end.
        """
        while self.failures.poll():
            try:
                outcome.failures.append(self.failures.recv())
            except EOFError:
                break
        is_stuck = time.monotonic() - self.progress[SINCE] > LIMIT and self.progress[AT] >= 0
        if self.process.is_alive() and not is_stuck:
            return True
        kind = "hang" if self.process.is_alive() else "crash"
        self.process.kill() if kind == "hang" else None
        self.process.join()
        self._count(outcome)
        at = int(self.progress[AT])
        if at < 0:
            return None
        outcome.failures.append({"kind": kind, "input": at, "exit": self.process.exitcode})
        outcome.hangs, outcome.crashes = (
            outcome.hangs + (kind == "hang"),
            outcome.crashes + (kind == "crash"),
        )
        outcome.inputs += 1
        left = range(at + self.numbers.step, self.numbers.stop, self.numbers.step)
        return Worker(self.target, left, self.seed, self.sound) if left else None

    def _count(self, outcome: Outcome) -> None:
        read, refused, failed = (int(self.progress[i]) for i in (READ, REFUSED, FAILED))
        outcome.read, outcome.refused = outcome.read + read, outcome.refused + refused
        outcome.tracebacks, outcome.inputs = (
            outcome.tracebacks + failed,
            outcome.inputs + read + refused + failed,
        )
        outcome.slowest_seconds = round(max(outcome.slowest_seconds, self.progress[SLOWEST]), 3)


def fuzz(target: Target, num_inputs: int, seed: int, processes: int) -> Outcome:
    """Read a number of inputs of a target."""
    outcome, start = Outcome(), time.monotonic()
    stripes = [range(k, num_inputs, processes) for k in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        sound = sound_files(target, Path(folder))
    workers = [Worker(target, stripe, seed, sound) for stripe in stripes if stripe]
    while workers:
        time.sleep(0.05)
        states = [(one, one.update(outcome)) for one in workers]
        workers = [one if update is True else update for one, update in states if update]  # type: ignore[misc]
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz all targets, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--only", type=int, help="one input, with its traceback")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(arguments)
    targets = [t for t in TARGETS if args.target in (None, t.name)]
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            sound = sound_files(targets[0], Path(folder))
            read_one(targets[0], args.only, args.seed, Path(folder), sound)
        return 0
    results = {}
    for target in targets:
        num_inputs = args.inputs * target.share // 1000
        outcome = fuzz(target, num_inputs, args.seed, args.processes)
        results[target.name] = vars(outcome)
        counts = {name: value for name, value in vars(outcome).items() if name != "failures"}
        print(target.name, json.dumps(counts), flush=True)
        for failure in outcome.failures[:MOST_FAILURES]:
            print("   ", json.dumps(failure), flush=True)
    failed = sum(r["tracebacks"] + r["hangs"] + r["crashes"] for r in results.values())
    total = sum(r["inputs"] for r in results.values())
    print(f"{total:,} inputs, {failed} failures")
    if args.write:
        about = {"inputs": total, "failures": failed, "seed": args.seed}
        write(
            "fuzz",
            about | {"processes": args.processes, "limit_seconds": LIMIT, "targets": results},
        )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
