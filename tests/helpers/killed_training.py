"""Training in processes that are killed: python killed_training.py FOLDER, called by its test.

Every child is forked from here, so that torch is imported once, and runs the same script on the
same folder as the one before it. SIGKILL lets no clean-up run: what a child leaves is what had
reached the kernel.
"""

import json
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

import anybatch as ab
from anybatch.runs import tensor_files
from anybatch.runs.checksums import Checksums
from small_training import start, train_small

EVENTS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "unlink"),
    (tensor_files.Output, "write"),  # in the middle of a checkpoint's file
    (torch.optim.SGD, "step"),
    (ab.Run, "record"),
]
NUM_EVENTS = 1900  # a little under those of a whole run


def script(folder):
    """Run the script of a user, again and again."""
    run = ab.Run(folder, checkpoint_every=2)
    for step in start().loop(run):
        run.record({"kind": "note", "step": step.step, "halved": step.loss / 2})


def fork_script(folder, kill_at=None):
    """Start the script in a child that kills itself as its event number `kill_at` begins."""
    pid = os.fork()
    if pid:
        return pid
    events = count(1)

    def count_calls(call):
        def wrapper(*arguments, **named):
            if next(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapper

    for owner, name in EVENTS:
        setattr(owner, name, count_calls(getattr(owner, name)))
    script(folder)
    print(next(events) - 1, file=sys.stderr)
    os._exit(0)


def was_killed(pid, folder):
    """Wait for a child, and see that the files it leaves have their checksums; an error in it ends
    all this."""
    status = os.waitpid(pid, 0)[1]
    if status not in (0, signal.SIGKILL):
        sys.exit(f"the script failed in {pid}")
    if (folder / "run.json").exists():
        checksums = Checksums.read(folder)
        if wrong := checksums.find_damage() + checksums.find_foreign():
            sys.exit(f"a kill was taken for damage: {wrong}")
    return status != 0


def kill_at_events(folder, events):
    """Kill one child after the other at these events, until one is at its end before."""
    for kills, event in enumerate([*events, None]):
        if not was_killed(fork_script(folder, event), folder):
            return kills


def kill_at_times(folder, rng):
    """Kill children after random times until one is at its end before."""
    for kills in count():
        pid = fork_script(folder)
        time.sleep(rng.random() * 0.15)
        os.kill(pid, signal.SIGKILL)
        if not was_killed(pid, folder):
            return kills


def main(root):
    """Kill many runs below `root`; print how often each was killed."""
    torch.set_num_threads(1)
    train_small()  # what torch imports at a first step
    rng = random.Random(0)
    kills = {}
    for event in [*range(1, 21), *rng.sample(range(21, NUM_EVENTS), 20)]:
        folder = root / f"event-{event}"
        kills[folder.name] = kill_at_events(folder, [event, rng.randrange(1, NUM_EVENTS)])
    for number in range(4):
        folder = root / f"time-{number}"
        kills[folder.name] = kill_at_times(folder, rng)
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
