"""Choices by measurement, stored for the next process on this machine with this torch:

    $XDG_CACHE_HOME/anybatch/NAME-VERSION-CPU.json

If the file cannot be read or written, each process measures again.
"""

import json
import os
import platform
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from anybatch.paths import find_user_folder

__all__ = ["read_choices", "write_choices"]


def read_choices(name: str) -> dict[str, Any]:
    """Read the stored choices of a kind; none if there is no readable file."""
    try:
        choices = json.loads(_find_file(name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return choices if isinstance(choices, dict) else {}


def write_choices(name: str, choices: Mapping[str, Any]) -> None:
    """Write all choices. The new file replaces the old one at once: no reader sees half of it."""
    try:
        file = _find_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        partial.replace(file)
    except OSError:  # the user has no home, or may not write there
        pass


def _find_file(name: str) -> Path:
    """Return the path of the choices on this machine with this torch.

    Raises:
        FileNotFoundError: the user has no home.
    """
    folder = find_user_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise FileNotFoundError("the user has no home")
    cpu = sha256(_describe_processor().encode()).hexdigest()[:12]
    return folder / f"{name}-{torch.__version__}-{cpu}.json"


def _describe_processor() -> str:
    """Return a text that differs between models of processors."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    first = cpuinfo.read_text().split("\n\n")[0].splitlines()
    changing = ("processor", "cpu MHz", "bogomips", "apicid", "initial apicid", "core id")
    return "\n".join(row for row in first if not row.startswith(changing))
