"""What the bits of a run may depend on besides its settings: versions, machine, the user's code."""

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import deterministic as _deterministic

import anybatch
from anybatch.errors import ModelError, RunError

__all__ = ["describe_arithmetic", "environment", "read_git_state", "use_deterministic_kernels"]

_FILES = 20  # as many are named
_SECONDS = 3.0  # that git may take for each of its answers
_FOLDERS = "--untracked-files=normal"  # new folders, and not all that is in them
_PLAIN = ("--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
_SUBMODULES = "--ignore-submodules=dirty"  # git would read them by their own configuration
_OWN = ("local", "worktree")  # scopes of the configuration that lies in the repository
_READ_ONLY = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "protocol.allow=never")

_ORDER_OF_SUMS = 2
"""Grows whenever the library comes to other bits in the same surroundings."""

_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)
"""Of the process, which choose kernels."""

_CUBLAS = (":4096:8", ":16:8")  # with these cuBLAS repeats its bits

# What they hold is made as they are imported, where a type checker does not see it.
_memory: Any = _deterministic
_mkldnn: Any = torch.backends.mkldnn
_cudnn: Any = torch.backends.cudnn


def environment(run: Path) -> dict[str, Any]:
    """Versions, machine, and the git state of the folder that one is in.

    Args:
        run: the run's folder, whose files are no code.
    """
    return {
        "anybatch": anybatch.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": read_git_state(run),
    }


def describe_arithmetic(model: nn.Module) -> dict[str, Any]:
    """What the bits of an update depend on beside the settings of a run, as plain JSON.

    Raises:
        RunError: a GPU whose matrix products do not repeat their bits.
    """
    devices = {p.device for p in model.parameters()}
    found = {
        "anybatch": anybatch.__version__,
        "order_of_sums": _ORDER_OF_SUMS,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "devices": sorted({_model_of(device) for device in devices}),
        "mkldnn": _mkldnn.is_available() and _mkldnn.enabled,
        "fp32_precision": [
            op.fp32_precision.replace("none", "ieee")  # the default, said or not
            for op in (_mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn)
        ],
        "flushes_denormals": bool(torch.tensor(2.0**-126) / 2 == 0),
        "compiled": _compiled(model),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return found | _of_cuda() if any(device.type == "cuda" for device in devices) else found


@contextmanager
def use_deterministic_kernels() -> Iterator[None]:
    """Only kernels that repeat their bits; all is as it was afterwards.

    Raises:
        ModelError: an operation that has none, by its name.
    """
    mode = torch.get_deterministic_debug_mode()
    is_filled, is_timed = _memory.fill_uninitialized_memory, _cudnn.benchmark
    torch.set_deterministic_debug_mode("error")
    _memory.fill_uninitialized_memory = False  # takes time, and changes no result
    _cudnn.benchmark = False  # which kernel is the fastest is found anew each time
    try:
        yield
    except RuntimeError as error:
        raise _in_words(error) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        _memory.fill_uninitialized_memory, _cudnn.benchmark = is_filled, is_timed


def read_git_state(run: Path) -> dict[str, Any] | None:
    """The commit, and what differs from it; None without git, a repository or a commit.

    Nothing is written, in the repository either, and nothing is printed. No program runs that the
    repository's own configuration names: it may have come with a stranger's folder.

    Args:
        run: a folder to leave out.

    Returns:
        "commit"; "uncommitted", how many files differ, those that git does not know included;
        "files", the first of them as `git status --porcelain` has them; "diff", the SHA-256 of
        `git diff --full-index HEAD`, None if it is empty. None, too, for what git did not tell in
        time.
    """
    found = _git("rev-parse", "HEAD", "--show-toplevel")
    if found is None:
        return None
    commit, top = os.fsdecode(found).split("\n")[:2]
    others = [":(top)"]
    if (folder := run.resolve()).is_relative_to(top):
        others.append(f":(top,exclude,literal){folder.relative_to(top)}")
    variables = _without_filters()
    status = ("status", "--porcelain", "-z", "--no-renames", _FOLDERS, _SUBMODULES, "--", *others)
    listed = None if variables is None else _git(*status, **variables)
    if variables is None or listed is None:
        return {"commit": commit, "uncommitted": None, "files": None, "diff": None}
    files = os.fsdecode(listed).split("\0")[:-1]
    known = [f":(top,literal){file[3:]}" for file in files if not file.startswith("?")]
    diff = _git("diff", *_PLAIN, _SUBMODULES, "HEAD", "--", *known, **variables) if known else None
    return {
        "commit": commit,
        "uncommitted": len(files),
        "files": [os.fsencode(file).decode(errors="replace") for file in files[:_FILES]],
        "diff": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _without_filters() -> dict[str, str] | None:
    """Environment variables that empty every filter which the repository's own configuration
    names: git would run it to compare a file with the commit. None where git does not tell."""
    listed = _git("config", "--list", "--show-scope", "--name-only", "-z")
    if listed is None:
        return None
    fields = os.fsdecode(listed).split("\0")
    own = {name for scope, name in zip(fields[::2], fields[1::2], strict=False) if scope in _OWN}
    before = os.environ.get("GIT_CONFIG_COUNT", "0")
    first, found = int(before) if before.isdecimal() else 0, dict[str, str]()
    for number, name in enumerate(sorted(n for n in own if n.startswith("filter.")), first):
        value = "false" if name.endswith(".required") else ""
        found |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return found | {"GIT_CONFIG_COUNT": str(first + len(found) // 2), "GIT_NO_LAZY_FETCH": "1"}


def _git(*arguments: str, **variables: str) -> bytes | None:
    """What git answers; None where it fails, or takes too long."""
    try:
        return subprocess.run(
            ["git", *_READ_ONLY, *arguments],
            check=True,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> dict[str, Any]:
    """Its kind, instructions and caches, by which kernels are chosen; how many cores there are is
    told by the threads."""
    found = torch.cpu.get_capabilities()
    return {name: found[name] for name in sorted(found) if not name.startswith("num_")}


def _model_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _of_cuda() -> dict[str, Any]:
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config not in _CUBLAS:
        raise RunError(
            f"bitwise=True on a GPU with CUBLAS_WORKSPACE_CONFIG = {config!r}, expected one of "
            f"{_CUBLAS}: cuBLAS does not repeat its bits otherwise. Set it before Python starts."
        )
    products = torch.backends.cuda.matmul
    return {
        "cuda": torch.version.cuda,
        "cudnn": _cudnn.version(),
        "cuda_fp32_precision": [op.fp32_precision for op in (products, _cudnn.conv, _cudnn.rnn)],
    }


def _compiled(model: nn.Module) -> list[str]:
    """The modules that torch.compile has in its hands."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
    ]


def _in_words(error: RuntimeError) -> Exception:
    """The error itself, but for that of an operation without a kernel that repeats its bits."""
    found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if found is None:
        return error
    told = ModelError(
        f"the operation {found[1]} has no kernel that repeats its bits, expected of each with "
        f"bitwise=True. Replace it in the model or the loss, or train without bitwise=True."
    )
    for note in getattr(error, "__notes__", ()):  # on which rank it was raised
        told.add_note(note)
    return told
