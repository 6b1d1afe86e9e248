"""Machines to start commands on, with a network between them.

in namespaces:   each has interfaces of its own, and a cable to one switch (veth and bridge)
on loopback:     each has an address of its own, and all else in common
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NUM_MACHINES = 3

_REACH = """
import contextlib, socket, sys
with contextlib.suppress(ConnectionRefusedError):  # by a machine that is there
    socket.create_connection((sys.argv[1], 9), timeout=10)
"""


@dataclass(frozen=True)
class Machine:
    """One machine, and what was started on it."""

    address: str
    interface: str
    prefix: tuple[str, ...] = ()  # of each command
    cable: tuple[str, ...] = ()  # that `ip` knows
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], output: Path) -> subprocess.Popen[str]:
        """A command, with its output in a file."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.interface}
        with output.open("w") as file:
            process = subprocess.Popen(
                [*self.prefix, *command], env=environment, stdout=file, stderr=file, text=True
            )
        self.started.append(process)
        return process

    def switch_off(self) -> None:
        """Everything on it is gone."""
        for process in self.started:
            for pid in [process.pid, *below(process.pid)] if process.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.started.clear()

    def unplug(self) -> None:
        """Cut the machine off without a word; what runs on it goes on."""
        _ip(*self.cable, "down")


@contextmanager
def in_namespaces() -> Iterator[list[Machine]]:
    """Machines that see nothing of one another but what goes through the switch.

    Raises:
        OSError: namespaces are not allowed here, or there is no command `ip`.
    """
    switch = f"anybatch{os.getpid()}"
    names = [f"{switch}-{number}" for number in range(NUM_MACHINES)]
    result = []
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            port, address = f"port{number}", f"10.77.0.{number + 1}"
            _ip("netns", "add", name)
            cable = ("type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "add", port, *cable)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            plug = ("-n", switch, "link", "set", port)
            result.append(Machine(address, "eth0", ("ip", "netns", "exec", name), plug))
        yield result
    finally:
        for machine in result:
            machine.switch_off()
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def on_loopback() -> Iterator[list[Machine]]:
    """Machines that share one, under several addresses."""
    result = [Machine(f"127.0.0.{number + 1}", "lo") for number in range(NUM_MACHINES)]
    try:
        yield result
    finally:
        for machine in result:
            machine.switch_off()


def why_no_namespaces() -> str | None:
    """Why there can be none here; None if there can."""
    try:
        with in_namespaces() as (first, second, _):
            reach = [*first.prefix, sys.executable, "-c", _REACH, second.address]
            done = subprocess.run(reach, capture_output=True, text=True, check=False)
        result = done.stderr.strip().rsplit("\n", 1)[-1]
    except OSError as error:
        result = str(error)
    return f"network namespaces are not available here: {result}" if result else None


def below(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)] = int(fields[1])
    result, todo = [], {pid}
    while todo:
        todo = {child for child, parent in parents.items() if parent in todo}
        result += todo
    return result


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
