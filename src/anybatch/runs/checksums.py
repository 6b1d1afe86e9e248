"""Checksums of the files of a run, in its run.json. That file marks a folder as a run.

    run.json = sealed JSON of {format, anybatch, files, others}      (see `seal`)
    files    = {path: [each state that the file may be in]},   state = [size in bytes, SHA-256]
    others   = names in the folder that do not belong to the run

A state of null says that there is no file. Before a file is replaced, made or removed, run.json
lists its new state next to the old one; afterwards only the new one. So a process that is killed at
any moment leaves files that agree with run.json. records.jsonl may be longer than its listed state:
rows are added between two checkpoints. A checkpoint is listed by its manifest, which has the
checksums of its other files.

Sealed JSON holds its own checksum, so that every changed byte is noticed:

    text   = canonical JSON of {..., sha256}
    sha256 = SHA-256 of the canonical JSON of the rest
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import anybatch
from anybatch.errors import RunError
from anybatch.limits import read_json, shorten
from anybatch.runs.disk import check_folder, open_file, read_file, replace_file

__all__ = [
    "EMPTY",
    "MARK",
    "AnnounceChanges",
    "Checksums",
    "State",
    "ignore_changes",
    "read_file_state",
    "seal",
    "unseal",
]

State = tuple[int, str] | None
AnnounceChanges = Callable[[Mapping[Path, State]], AbstractContextManager[None]]
"""Gets the new states of files before they change; its context is active during the change."""

MARK = "run.json"
EMPTY = (0, hashlib.sha256().hexdigest())
_FORMAT = 2
_RECORDS = "records.jsonl"

_UNLISTED = {
    "": r"run\.json|checkpoints|ledger|(run\.json|recipe\.toml|records\.jsonl)\.partial"
    r"|records\.jsonl\.damaged-\d+|outcome\.json|model\.safetensors|explain-step-\d+(-chosen)?\.html"
    r"|tensorboard|mlflow|mlflow\.db(-\w+)?|wandb",
    "checkpoints": r"step-\d{12}(\.partial|\.damaged-\d+)",
    "ledger": r"steps-\d{12}-\d{12}(\.parquet)?\.partial",
}
"""Names that need no listing: leftovers, and what commands and trackers write by default."""


class Checksums:
    """Content of the run.json of a run."""

    def __init__(
        self, folder: Path, files: Mapping[str, list[State]], version: str = anybatch.__version__
    ) -> None:
        self.folder = folder
        self.version = version  # of anybatch that made the run
        self.files = dict(files)
        self.others: set[str] = set()
        self.is_old = False  # whether the run was made before there were checksums
        self._last_write = b""

    @classmethod
    def read(cls, folder: Path) -> "Checksums":
        """Read the run.json of a run.

        Raises:
            RunError: the file is missing, damaged or of another format, or it is no plain file.
        """
        try:
            data = read_file(folder / MARK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"{folder} is no run: it has no {MARK}. Name the folder of a run; if the file was "
                f"lost, restore it from a copy."
            ) from error
        body = unseal(data)
        checksums = cls(folder, {})
        if body is None:
            checksums.version = _read_old_version(folder, data)
            checksums.is_old = True
            return checksums
        if body.get("format") != _FORMAT:
            raise RunError(
                f"{folder} is a run of format {body.get('format')}. This version of anybatch reads "
                f"the formats 1 and {_FORMAT}. Use the version that made it: "
                f"{body.get('anybatch')}."
            )
        try:
            checksums.version = str(body["anybatch"])
            checksums.others = set(map(str, body["others"]))
            checksums.files = {n: _parse_states(n, states) for n, states in body["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{folder / MARK} was not written by anybatch: {error!r} on reading it. "
                f"Restore it from a copy."
            ) from error
        return checksums

    def list_all(self) -> None:
        """List all files of a run that was made before there were checksums."""
        names = ["lock", "recipe.toml", _RECORDS]
        names += [f"checkpoints/{n}/manifest.json" for n in _list_names(self.folder, "checkpoints")]
        names += [f"ledger/{name}" for name in _list_names(self.folder, "ledger")]
        states = {name: read_file_state(self.folder / name) for name in names}
        self.files = {name: [state] for name, state in states.items() if state is not None}
        self.is_old = False
        self.write()

    @contextmanager
    def announce(self, changes: Mapping[Path, State]) -> Iterator[None]:
        """List the new states of files next to the old ones; at the end, only the new ones."""
        for path, state in changes.items():
            name = self._relative(path)
            old = self.files.get(name, [None])
            self.files[name] = [*old, *({state} - {*old})]
        self.write()
        yield
        for path, state in changes.items():
            self.set_state(path, state)
        self.write()

    def set_state(self, path: Path, state: State) -> None:
        """List only this state of a file, from the next `write` on."""
        if state is None:
            self.files.pop(self._relative(path), None)
        else:
            self.files[self._relative(path)] = [state]

    def write(self) -> None:
        """Write run.json if its content has changed."""
        self.others = {name for name in _list_names(self.folder) if not self._belongs("", name)}
        body = {"format": _FORMAT, "anybatch": self.version, "others": sorted(self.others)}
        data = seal({**body, "files": self.files})
        if data != self._last_write:
            replace_file(self.folder / MARK, [data])
            self._last_write = data

    def find_damage(
        self, names: Iterable[str] | None = None, *, raise_errors: bool = False
    ) -> list[str]:
        """Compare files with their checksums.

        Args:
            names: paths in the run; None: all that are listed.
            raise_errors: whether to raise the error of a disk that cannot read a file.

        Returns:
            A sentence for each file that is missing, changed, or cannot be read.
        """
        selection = self.files if names is None else self.files.keys() & set(names)
        sentences = []
        for name in sorted(selection):
            try:
                sentences.append(_compare(self.folder, name, self.files[name]))
            except OSError as error:
                if raise_errors:
                    raise
                sentences.append(str(error))
        return [sentence for sentence in sentences if sentence is not None]

    def find_unchecked(self) -> list[str]:
        """List the files in the folder that have no checksum: of trackers, commands, the user."""
        skip = re.compile(rf"{re.escape(MARK)}|checkpoints|ledger|.*\.partial")
        names = _list_names(self.folder)
        return [name for name in names if name not in self.files and not skip.fullmatch(name)]

    def count_new_rows(self, path: Path) -> int:
        """Count the lines of the records that have no checksum yet."""
        if not path.exists():
            return 0
        states = self.files.get(self._relative(path), [])
        with open_file(path, "rb") as file:
            file.seek(max((state[0] for state in states if state is not None), default=0))
            return file.read().count(b"\n")

    def find_foreign(self, folders: Iterable[str] = tuple(_UNLISTED)) -> list[str]:
        """Find files that run.json does not list; return a sentence for each.

        Args:
            folders: where to look; "" is the run itself.
        """
        return [
            f"{self.folder / below / name} is no file of this run, since {MARK} does not list it. "
            f"Move it out of the folder; or, if {MARK} was replaced by an older one, put the newer "
            f"one back."
            for below in folders
            for name in _list_names(self.folder, below)
            if not self._belongs(below, name) and not (below == "" and name in self.others)
        ]

    def _belongs(self, below: str, name: str) -> bool:
        """Return whether a name in a folder of the run is listed, or needs no listing."""
        path = {"": name, "checkpoints": f"{below}/{name}/manifest.json"}.get(
            below, f"{below}/{name}"
        )
        return path in self.files or re.fullmatch(_UNLISTED[below], name) is not None

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def read_file_state(path: Path, at_most: int | None = None) -> State:
    """Compute the size and SHA-256 of a file; None if there is no file.

    Args:
        at_most: number of bytes to read; None: all.

    Raises:
        RunError: the path is no plain file.
    """
    try:
        with open_file(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256, left = hashlib.sha256(), size if at_most is None else min(size, at_most)
            while left and (piece := file.read(min(left, 1 << 20))):
                sha256.update(piece)
                left -= len(piece)
            return file.tell(), sha256.hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def ignore_changes(changes: Mapping[Path, State]) -> Iterator[None]:
    """Change files that belong to no run."""
    yield


def seal(body: dict[str, Any]) -> bytes:
    """Write a JSON object with its checksum."""
    checksum = hashlib.sha256(_write_canonical(body)).hexdigest()
    return _write_canonical({**body, "sha256": checksum})


def unseal(data: bytes) -> dict[str, Any] | None:
    """Read what `seal` has written, without the checksum; None if any byte differs."""
    try:
        body = dict(read_json(data))
        del body["sha256"]
        return body if seal(body) == data else None
    except (ValueError, KeyError, TypeError):
        return None  # no JSON, no object or no checksum


def _write_canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _compare(run: Path, name: str, states: Sequence[State]) -> str | None:
    """Say how a file differs from all of its states; None if it is in one of them."""
    path, current = run / name, None
    try:
        for folder in list(Path(name).parents)[:-1]:
            check_folder(run / folder)
        for state in states:
            at_most = state[0] if state is not None and name == _RECORDS else None
            current = read_file_state(path, at_most)
            if current == state:
                return None
    except (RunError, ValueError) as error:  # ValueError: the name cannot be a file
        return str(error)
    expected = " or ".join(map(_describe, states))
    return (
        f"{path} is not as the run wrote it: expected {expected}; found {_describe(current)}. "
        f"Restore the file from a copy."
    )


def _describe(state: State) -> str:
    return "no file" if state is None else f"{state[0]} bytes with SHA-256 {state[1]}"


def _list_names(folder: Path, below: str = "") -> list[str]:
    place = folder / below
    return sorted(os.listdir(place)) if place.is_dir() else []


def _parse_states(name: str, states: Any) -> list[State]:
    """Read the states of a file in run.json."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} is not in the run")
    if not (isinstance(states, list) and states):
        raise ValueError(f"{name} has no state")
    return [None if state is None else _parse_state(name, *state) for state in states]


def _parse_state(name: str, num_bytes: Any, sha256: Any) -> tuple[int, str]:
    if not (type(num_bytes) is int and num_bytes >= 0 and isinstance(sha256, str)):
        raise ValueError(f"the state of {name} is {shorten([num_bytes, sha256])}")
    return num_bytes, sha256


def _read_old_version(folder: Path, data: bytes) -> str:
    """Read run.json of a run without checksums (format 1): the version that made it."""
    try:
        mark = dict(read_json(data))
        if mark.get("format") == 1 and mark.keys() <= {"format", "anybatch"}:
            return str(mark.get("anybatch"))
        reason = "its checksum does not fit its content"
    except (ValueError, TypeError) as error:
        reason = str(error)
    raise RunError(
        f"{folder / MARK} is damaged: {reason}. It must be a JSON object as the run wrote it. "
        f'Restore it from a copy. Without one, write {{"format": 1}} into it: the run goes on, '
        f"and the checksums of its files so far are lost."
    )
