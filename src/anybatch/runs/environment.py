"""Describe what the bits of a run may depend on: versions, machine, settings of kernels, code."""

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
from torch.utils import deterministic as _torch_deterministic

import anybatch
from anybatch.errors import ModelError, RunError

__all__ = [
    "describe_arithmetic",
    "describe_environment",
    "read_git_state",
    "use_deterministic_kernels",
]

_MAX_FILES = 20  # that are named
_TIMEOUT = 3.0  # seconds for each git command
_FOLDERS = "--untracked-files=normal"  # list a new folder, and not all its files
_PLAIN = ("--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
_SUBMODULES = "--ignore-submodules=dirty"  # otherwise git would use their own configuration
_REPOSITORY_SCOPES = ("local", "worktree")
_READ_ONLY = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "protocol.allow=never")

_ORDER_OF_SUMS = 2
"""Version of the library's arithmetic: it grows when the same environment gives other bits."""

_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)
"""Environment variables that choose kernels."""

_CUBLAS = (":4096:8", ":16:8")  # the settings with which cuBLAS repeats its bits

# These modules create their attributes on import, where a type checker does not see them.
_memory: Any = _torch_deterministic
_mkldnn: Any = torch.backends.mkldnn
_cudnn: Any = torch.backends.cudnn


def describe_environment(run: Path) -> dict[str, Any]:
    """List versions, machine, and the git state of the current folder.

    Args:
        run: the run's folder, whose files are no code.
    """
    return {
        **_list_versions(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "git": read_git_state(run),
    }


def describe_arithmetic(model: nn.Module) -> dict[str, Any]:
    """List what the bits of an update depend on, besides settings of the run, as plain JSON.

    Raises:
        RunError: matrix products on the GPU do not repeat their bits.
    """
    devices = {p.device for p in model.parameters()}
    facts = {
        **_list_versions(),
        "order_of_sums": _ORDER_OF_SUMS,
        "processor": _describe_processor(),
        "devices": sorted({_name_device(device) for device in devices}),
        "mkldnn": _mkldnn.is_available() and _mkldnn.enabled,
        "fp32_precision": [
            op.fp32_precision.replace("none", "ieee")  # "none" means the default, which is ieee
            for op in (_mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn)
        ],
        "flushes_denormals": bool(torch.tensor(2.0**-126) / 2 == 0),
        "compiled": _list_compiled(model),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return facts | _describe_cuda() if any(d.type == "cuda" for d in devices) else facts


@contextmanager
def use_deterministic_kernels() -> Iterator[None]:
    """Use only kernels that repeat their bits, and restore torch's settings at the end.

    Raises:
        ModelError: an operation has no such kernel; the message names it.
    """
    mode = torch.get_deterministic_debug_mode()
    fill, benchmark = _memory.fill_uninitialized_memory, _cudnn.benchmark
    torch.set_deterministic_debug_mode("error")
    _memory.fill_uninitialized_memory = False  # it takes time and changes no result
    _cudnn.benchmark = False  # it would choose kernels by timing
    try:
        yield
    except RuntimeError as error:
        raise _explain(error) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        _memory.fill_uninitialized_memory, _cudnn.benchmark = fill, benchmark


def read_git_state(run: Path) -> dict[str, Any] | None:
    """Read the commit, and what differs from it; None without git, a repository or a commit.

    Nothing is written or printed. No program runs that the repository's own configuration names: it
    may have come with a stranger's folder.

    Args:
        run: a folder to leave out.

    Returns:
        "commit"; "uncommitted", the number of files that differ, untracked files included;
        "files", the first of them as `git status --porcelain` has them; "diff", the SHA-256 of
        `git diff --full-index HEAD`, None if it is empty. All but "commit" are None if git failed
        or took too long.
    """
    head = _run_git("rev-parse", "HEAD", "--show-toplevel")
    if head is None:
        return None
    commit, top = os.fsdecode(head).split("\n")[:2]
    paths = [":(top)"]
    if (folder := run.resolve()).is_relative_to(top):
        paths.append(f":(top,exclude,literal){folder.relative_to(top)}")
    variables = _disable_filters()
    status = ("status", "--porcelain", "-z", "--no-renames", _FOLDERS, _SUBMODULES, "--", *paths)
    output = None if variables is None else _run_git(*status, **variables)
    if variables is None or output is None:
        return {"commit": commit, "uncommitted": None, "files": None, "diff": None}
    files = os.fsdecode(output).split("\0")[:-1]
    diff = None
    if tracked := [f":(top,literal){file[3:]}" for file in files if not file.startswith("?")]:
        diff = _run_git("diff", *_PLAIN, _SUBMODULES, "HEAD", "--", *tracked, **variables)
    return {
        "commit": commit,
        "uncommitted": len(files),
        "files": [os.fsencode(file).decode(errors="replace") for file in files[:_MAX_FILES]],
        "diff": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _disable_filters() -> dict[str, str] | None:
    """Build environment variables that disable all filters of the repository; None on failure.

    Git would run such a filter program to compare a file with the commit.
    """
    output = _run_git("config", "--list", "--show-scope", "--name-only", "-z")
    if output is None:
        return None
    fields = os.fsdecode(output).split("\0")
    pairs = zip(fields[::2], fields[1::2], strict=False)
    names = sorted(
        {n for scope, n in pairs if scope in _REPOSITORY_SCOPES and n.startswith("filter.")}
    )
    before = os.environ.get("GIT_CONFIG_COUNT", "0")
    first = int(before) if before.isdecimal() else 0
    variables = {"GIT_CONFIG_COUNT": str(first + len(names)), "GIT_NO_LAZY_FETCH": "1"}
    for number, name in enumerate(names, first):
        value = "false" if name.endswith(".required") else ""
        variables |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return variables


def _run_git(*arguments: str, **variables: str) -> bytes | None:
    """Run git and return its output; None if it fails or takes too long."""
    try:
        return subprocess.run(
            ["git", *_READ_ONLY, *arguments],
            check=True,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _list_versions() -> dict[str, Any]:
    return {
        "anybatch": anybatch.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _describe_processor() -> dict[str, Any]:
    """Read model, instructions and caches, which choose kernels; numbers of cores do not."""
    facts = torch.cpu.get_capabilities()
    return {name: facts[name] for name in sorted(facts) if not name.startswith("num_")}


def _name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _describe_cuda() -> dict[str, Any]:
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config not in _CUBLAS:
        raise RunError(
            f"bitwise=True on a GPU with CUBLAS_WORKSPACE_CONFIG = {config!r}. It must be one of "
            f"{_CUBLAS}: cuBLAS does not repeat its bits otherwise. Set it before Python starts."
        )
    products = torch.backends.cuda.matmul
    return {
        "cuda": torch.version.cuda,
        "cudnn": _cudnn.version(),
        "cuda_fp32_precision": [op.fp32_precision for op in (products, _cudnn.conv, _cudnn.rnn)],
    }


def _list_compiled(model: nn.Module) -> list[str]:
    """List the modules that torch.compile has compiled."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
    ]


def _explain(error: RuntimeError) -> Exception:
    """Turn torch's error on a kernel that does not repeat its bits into a ModelError."""
    match = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if match is None:
        return error
    explanation = ModelError(
        f"the operation {match[1]} has no kernel that repeats its bits, and bitwise=True needs "
        f"one. Replace it in the model or the loss, or train without bitwise=True."
    )
    for note in getattr(error, "__notes__", ()):  # it names the rank
        explanation.add_note(note)
    return explanation
