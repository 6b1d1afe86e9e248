"""Run commands and scripts in forked children, and strike each at one call that changes its folder.

torch is imported once, here, and each command is a fork, which starts in milliseconds. A small
library in C (`torture_calls.c`) counts and strikes the calls of a child. LD_PRELOAD puts it before
the C library, so that it sees the calls of Python, torch and Arrow.
"""

import ctypes
import errno
import importlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anybatch

__all__ = ["ACTIONS", "Ended", "Strike", "fork", "import_all", "preload", "start"]

ACTIONS: dict[str, tuple[str, int]] = {
    "kill": ("k", 0),
    "half": ("h", 0),
    "EIO": ("e", errno.EIO),
    "ENOSPC": ("f", errno.ENOSPC),
    "reading": ("r", errno.EIO),
    "SIGTERM": ("s", signal.SIGTERM),
    "SIGINT": ("s", signal.SIGINT),
}
"""Actions at a call; see `torture_calls.c`. A full disk stays full."""

PATIENCE = 60.0
"""Seconds after which a child hangs."""

STOPS = (signal.SIGINT, signal.SIGTERM)

MAIN = str(Path(anybatch.__file__).with_name("__main__.py"))

LIBRARY = "ANYBATCH_TORTURE_CALLS"


@dataclass(frozen=True)
class Strike:
    """Strike at a child: at a call or, for signals, after some seconds."""

    action: str
    number: int = 0  # of the call, from 1
    seconds: float | None = None


@dataclass(frozen=True)
class Ended:
    """End of a child."""

    code: int  # as in a shell: 128 + N after signal N
    out: str
    err: str
    calls: list[str]  # each call that changed the folder: name and path below it
    is_struck: bool  # whether it reached the strike


def preload() -> None:
    """Start this process again with the library loaded first, unless it is loaded already."""
    if LIBRARY in os.environ:
        return
    compiler = shutil.which("cc") or sys.exit("No C compiler: install one that is called cc.")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "calls.so"
        source = Path(__file__).with_name("torture_calls.c")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        environment = {
            **os.environ,
            LIBRARY: str(library),
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
        }
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


def import_all(names: str) -> None:
    """Import modules by name, so that no child needs to. Skip those that fail."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names.split():
            with suppress(Exception):
                importlib.import_module(name)


def fork(folder: Path, argv: list[str], strike: Strike | None = None) -> Ended:
    """Run `anybatch ARGUMENTS`, or a script where the first is one, in a child.

    Args:
        folder: its working folder; calls that change something below it are counted.
        argv: the arguments.
        strike: what to do to it; None: nothing.
    """
    files = _files(folder)
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    pid = os.fork()
    if pid == 0:
        _live(folder, argv, strike, files)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    return _follow(pid, files, strike)


def start(folder: Path, argv: list[str], strike: Strike) -> Ended:
    """Run `anybatch ARGUMENTS` in a separate process, which imports torch itself."""
    files = _files(folder)
    files["calls"].unlink(missing_ok=True)  # of an earlier child
    with files["out"].open("w") as out, files["err"].open("w") as err:
        command = [sys.executable, "-m", "anybatch", *argv]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
    ended = _follow(process.pid, files, strike)
    process.returncode = ended.code  # so that nobody waits for it again
    return ended


def _files(folder: Path) -> dict[str, Path]:
    return {name: folder.with_name(f"{folder.name}.{name}") for name in ("out", "err", "calls")}


def _follow(pid: int, files: dict[str, Path], strike: Strike | None) -> Ended:
    code = _wait(pid, strike)
    out, err, calls = (file.read_text() if file.exists() else "" for file in files.values())
    lines = calls.splitlines()
    is_struck = strike is not None and (len(lines) >= strike.number > 0)
    return Ended(code, out, err, lines, is_struck)


def _live(folder: Path, argv: list[str], strike: Strike | None, files: dict[str, Path]) -> None:
    """Run the child, and exit."""
    code = 1
    try:
        descriptors = [os.open(f, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for f in files.values()]
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)
        os.chdir(folder)
        os.environ["PWD"] = str(folder)
        action, argument = ACTIONS[strike.action] if strike else ("k", 0)
        number = strike.number if strike else 0
        calls = ctypes.CDLL(os.environ[LIBRARY])
        trace = descriptors[2]
        calls.torture_arm(os.fsencode(folder), ctypes.c_long(number), ord(action), argument, trace)
        code = _call(argv)
    finally:
        os._exit(code)


def _call(argv: list[str]) -> int:
    """Run a command or script, and return the exit code of the interpreter."""
    is_script = argv[0].endswith(".py")
    sys.argv = argv if is_script else ["anybatch", *argv]
    file = argv[0] if is_script else MAIN
    program = compile(Path(file).read_text(), file, "exec")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    except KeyboardInterrupt:  # the signal came before the command began
        return 130
    code: Any = 0
    try:
        try:
            exec(program, {"__name__": "__main__"})
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    return code if isinstance(code, int) else 1


def _wait(pid: int, strike: Strike | None) -> int:
    """Wait for the end of a child, and send it its signal on the way."""
    child = os.pidfd_open(pid)
    try:
        if strike is not None and strike.seconds is not None:
            select.select([child], [], [], strike.seconds)
            signal.pidfd_send_signal(child, ACTIONS[strike.action][1] or signal.SIGKILL)
        if not select.select([child], [], [], PATIENCE)[0]:
            signal.pidfd_send_signal(child, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
    finally:
        os.close(child)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code
