"""A million damaged and hostile inputs: each is read, or refused by an AnybatchError.

    python benchmarks/fuzz.py [--inputs 1000000] [--seed 0] [--target NAME] [--write]

Input i of a target depends on the seed, the target and i alone. Processes of their own read the
inputs, each a stripe of them; the main process watches. A traceback is any other exception; a hang
is an input that takes longer than LIMIT seconds; a crash is a process that ends. Each failure is
kept with its number, so that `--target NAME --only i` repeats it.
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
KEPT = 20  # failures of a target that are kept in full
AT, SINCE, READ, REFUSED, FAILED, SLOWEST = range(6)  # places of what a process tells


@dataclass
class Outcome:
    """Counts of what came of the inputs of a target."""

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
    for name in (*target.files, *target.written):
        (folder / name).write_bytes(sound[name])
    chosen = random.choice(target.files)
    (folder / chosen).write_bytes(target.mutate(sound[chosen], random))
    target.seal(folder)
    target.read(folder)


def sound_files(target: Target, folder: Path) -> dict[str, bytes]:
    """Make a sound input, see that it is read, and return its files."""
    target.sound(folder)
    found = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    target.read(folder)
    return found


def work(
    target: Target, numbers: range, seed: int, sound: dict[str, bytes], told: Any, failures: Any
) -> None:
    """Read inputs, and tell after each how far this process is."""
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
            told[AT], told[SINCE] = number, time.monotonic()
            try:
                read_one(target, number, seed, folder, sound)
                told[READ] += 1
            except AnybatchError:
                told[REFUSED] += 1
            except Exception as error:
                told[FAILED] += 1
                if told[FAILED] <= KEPT:
                    failures.send(describe(number, error))
            told[SLOWEST] = max(told[SLOWEST], time.monotonic() - told[SINCE])
        told[AT] = -1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe(number: int, error: BaseException) -> dict[str, Any]:
    """A traceback in one entry."""
    places = [
        f"{Path(at.filename).name}:{at.lineno}" for at in extract_tb(error.__traceback__)[-4:]
    ]
    text = f"{type(error).__name__}: {error}"[:200]
    return {"kind": "traceback", "input": number, "error": ascii(text), "places": places}


class Watched:
    """A process and the stripe of inputs that it reads."""

    def __init__(self, target: Target, numbers: range, seed: int, sound: dict[str, bytes]) -> None:
        self.target, self.numbers, self.seed, self.sound = target, numbers, seed, sound
        context = multiprocessing.get_context("fork")
        self.told = context.RawArray("d", 6)
        self.told[AT], self.told[SINCE] = numbers.start, time.monotonic() + 30  # time to begin
        self.failures, sending = context.Pipe(duplex=False)
        arguments = (target, numbers, seed, sound, self.told, sending)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()
        sending.close()

    def look(self, found: Outcome) -> "Watched | bool | None":
        """Take in what the process tells: True while it goes on, else what is to go on instead."""
        while self.failures.poll():
            try:
                found.failures.append(self.failures.recv())
            except EOFError:
                break
        is_stuck = time.monotonic() - self.told[SINCE] > LIMIT and self.told[AT] >= 0
        if self.process.is_alive() and not is_stuck:
            return True
        kind = "hang" if self.process.is_alive() else "crash"
        self.process.kill() if kind == "hang" else None
        self.process.join()
        self._count(found)
        at = int(self.told[AT])
        if at < 0:
            return None
        found.failures.append({"kind": kind, "input": at, "exit": self.process.exitcode})
        found.hangs, found.crashes = (
            found.hangs + (kind == "hang"),
            found.crashes + (kind == "crash"),
        )
        found.inputs += 1
        left = range(at + self.numbers.step, self.numbers.stop, self.numbers.step)
        return Watched(self.target, left, self.seed, self.sound) if left else None

    def _count(self, found: Outcome) -> None:
        read, refused, failed = (int(self.told[i]) for i in (READ, REFUSED, FAILED))
        found.read, found.refused = found.read + read, found.refused + refused
        found.tracebacks, found.inputs = (
            found.tracebacks + failed,
            found.inputs + read + refused + failed,
        )
        found.slowest_seconds = round(max(found.slowest_seconds, self.told[SLOWEST]), 3)


def fuzz(target: Target, num_inputs: int, seed: int, processes: int) -> Outcome:
    """Read so many inputs of a target."""
    found, begun = Outcome(), time.monotonic()
    stripes = [range(k, num_inputs, processes) for k in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        sound = sound_files(target, Path(folder))
    going = [Watched(target, stripe, seed, sound) for stripe in stripes if stripe]
    while going:
        time.sleep(0.05)
        looks = [(one, one.look(found)) for one in going]
        going = [one if look is True else look for one, look in looks if look]  # type: ignore[misc]
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz all targets; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--only", type=int, help="one input, its traceback as it is")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(arguments)
    targets = [t for t in TARGETS if asked.target in (None, t.name)]
    if asked.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            sound = sound_files(targets[0], Path(folder))
            read_one(targets[0], asked.only, asked.seed, Path(folder), sound)
        return 0
    results = {}
    for target in targets:
        num_inputs = asked.inputs * target.share // 1000
        found = fuzz(target, num_inputs, asked.seed, asked.processes)
        results[target.name] = vars(found)
        counts = {name: value for name, value in vars(found).items() if name != "failures"}
        print(target.name, json.dumps(counts), flush=True)
        for failure in found.failures[:KEPT]:
            print("   ", json.dumps(failure), flush=True)
    failed = sum(r["tracebacks"] + r["hangs"] + r["crashes"] for r in results.values())
    total = sum(r["inputs"] for r in results.values())
    print(f"{total:,} inputs, {failed} failures")
    if asked.write:
        about = {"inputs": total, "failures": failed, "seed": asked.seed}
        write(
            "fuzz",
            about | {"processes": asked.processes, "limit_seconds": LIMIT, "targets": results},
        )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
