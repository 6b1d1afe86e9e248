"""Checksums of a run's files, in its run.json, which marks the folder as a run.

    run.json = sealed JSON of {format, anybatch, files, others}      (see `seal`)
    files    = {path: [each state that the file may be in]},   state = [size in bytes, SHA-256]
    others   = names in the folder that are not the run's own

A state of null says that there is no file. Before a file is replaced, made or removed, run.json
lists its new state besides the old one; afterwards the new one alone. So a process that is killed
at any moment leaves files that agree with run.json. records.jsonl may be longer than it is listed:
rows come between two checkpoints. A checkpoint is listed by its manifest, which has the checksums
of its other files.

Sealed JSON holds its own checksum, so that no byte of it can change unseen:

    text   = canonical JSON of {..., sha256}
    sha256 = SHA-256 of the canonical JSON of the rest

A text is read only if it equals, byte for byte, the canonical text of what it says.
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
"""Announces the states that files are about to be in, and confirms them afterwards."""

MARK = "run.json"
EMPTY = (0, hashlib.sha256().hexdigest())
_FORMAT = 2
_GROWING = "records.jsonl"

_KNOWN = {
    "": r"run\.json|checkpoints|ledger|(run\.json|recipe\.toml|records\.jsonl)\.partial"
    r"|records\.jsonl\.damaged-\d+|outcome\.json|model\.safetensors|explain-step-\d+(-chosen)?\.html"
    r"|tensorboard|mlflow|mlflow\.db(-\w+)?|wandb",
    "checkpoints": r"step-\d{12}(\.partial|\.damaged-\d+)",
    "ledger": r"steps-\d{12}-\d{12}(\.parquet)?\.partial",
}
"""Names that need not be listed: leftovers, and what commands and trackers write by default."""


class Checksums:
    """What run.json says of the files of a run."""

    def __init__(
        self, folder: Path, files: Mapping[str, list[State]], version: str = anybatch.__version__
    ) -> None:
        self.folder = folder
        self.version = version  # of anybatch that made the run
        self.files = dict(files)
        self.others: set[str] = set()
        self.is_old = False  # whether the run was made before there were checksums
        self._written = b""

    @classmethod
    def read(cls, folder: Path) -> "Checksums":
        """Read the run.json of a run.

        Raises:
            RunError: it is missing, damaged, of another format, or no file.
        """
        try:
            data = read_file(folder / MARK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"{folder} is no run: it has no {MARK}. Name the folder of a run; if the file was "
                f"lost, restore it from a copy."
            ) from error
        body = unseal(data)
        found = cls(folder, {})
        if body is None:
            found.version = _read_old(folder, data)
            found.is_old = True
            return found
        if body.get("format") != _FORMAT:
            raise RunError(
                f"{folder} is a run of format {body.get('format')}. This version of anybatch reads "
                f"the formats 1 and {_FORMAT}. Use the version that made it: "
                f"{body.get('anybatch')}."
            )
        try:
            found.version, found.others = str(body["anybatch"]), set(map(str, body["others"]))
            found.files = {name: _states(name, states) for name, states in body["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{folder / MARK} was not written by anybatch: {error!r} on reading it. "
                f"Restore it from a copy."
            ) from error
        return found

    def adopt(self) -> None:
        """List all files of a run that was made before there were checksums, as they are."""
        found = ["lock", "recipe.toml", _GROWING]
        found += [
            f"checkpoints/{name}/manifest.json" for name in _names(self.folder, "checkpoints")
        ]
        found += [f"ledger/{name}" for name in _names(self.folder, "ledger")]
        states = {name: read_file_state(self.folder / name) for name in found}
        self.files = {name: [state] for name, state in states.items() if state is not None}
        self.is_old = False
        self.write()

    @contextmanager
    def changing(self, changes: Mapping[Path, State]) -> Iterator[None]:
        """List new states of files besides the old ones; once the block is left, the new alone."""
        new = {path.relative_to(self.folder).as_posix(): state for path, state in changes.items()}
        for name, state in new.items():
            old = self.files.get(name, [None])
            self.files[name] = [*old, *({state} - {*old})]
        self.write()
        yield
        for path, state in changes.items():
            self.note(path, state)
        self.write()

    def note(self, path: Path, state: State) -> None:
        """List a file in this state alone, from the next `write` on."""
        name = path.relative_to(self.folder).as_posix()
        self.files[name] = [state]
        if state is None:
            del self.files[name]

    def write(self) -> None:
        """Bring run.json to the disk, if it has changed."""
        self.others = {name for name in _names(self.folder) if not self._is_own("", name)}
        body = {"format": _FORMAT, "anybatch": self.version, "others": sorted(self.others)}
        data = seal({**body, "files": self.files})
        if data != self._written:
            replace_file(self.folder / MARK, [data])
            self._written = data

    def find_damage(self, names: Iterable[str] | None = None) -> list[str]:
        """Compare files with their checksums.

        Args:
            names: paths in the run; None: all that are listed.

        Returns:
            A sentence for each file that is missing or changed.
        """
        listed = self.files if names is None else self.files.keys() & set(names)
        told = (_compare(self.folder, name, self.files[name]) for name in sorted(listed))
        return [text for text in told if text is not None]

    def find_unchecked(self) -> list[str]:
        """List what lies in the folder without a checksum: of trackers, commands, the user."""
        own = re.compile(rf"{re.escape(MARK)}|checkpoints|ledger|.*\.partial")
        names = _names(self.folder)
        return [name for name in names if name not in self.files and not own.fullmatch(name)]

    def num_rows_since(self, path: Path) -> int:
        """Count the whole lines of a growing file that have no checksum yet."""
        if not path.exists():
            return 0
        states = self.files.get(path.relative_to(self.folder).as_posix(), [])
        with open_file(path, "rb") as file:
            file.seek(max((state[0] for state in states if state is not None), default=0))
            return file.read().count(b"\n")

    def find_foreign(self, folders: Iterable[str] = tuple(_KNOWN)) -> list[str]:
        """Find files that run.json does not list; a sentence for each.

        Args:
            folders: where to look; "" is the run itself.
        """
        return [
            f"{self.folder / below / name} is no file of this run, since {MARK} does not list it. "
            f"Move it out of the folder; or, if {MARK} was replaced by an older one, put the newer "
            f"one back."
            for below in folders
            for name in _names(self.folder, below)
            if not self._is_own(below, name) and not (below == "" and name in self.others)
        ]

    def _is_own(self, below: str, name: str) -> bool:
        own = {"": name, "checkpoints": f"{below}/{name}/manifest.json"}.get(
            below, f"{below}/{name}"
        )
        return own in self.files or re.fullmatch(_KNOWN[below], name) is not None


def read_file_state(path: Path, at_most: int | None = None) -> State:
    """Read a file for its state; None if there is none.

    Args:
        at_most: how many bytes of it to take into account; None: all.

    Raises:
        RunError: what is no plain file.
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


def _compare(run: Path, name: str, states: Sequence[State]) -> str | None:
    """Say how a file differs from all of its states; None if it is in one of them."""
    path, found = run / name, None
    try:
        for folder in list(Path(name).parents)[:-1]:
            check_folder(run / folder)
        for state in states:
            at_most = state[0] if state is not None and name == _GROWING else None
            found = read_file_state(path, at_most)
            if found == state:
                return None
    except (RunError, OSError, ValueError) as error:  # ValueError: no name of a file
        return str(error)
    listed, came = " or ".join(map(_in_words, states)), _in_words(found)
    return (
        f"{path} is not as the run wrote it: expected {listed}; found {came}. "
        f"Restore the file from a copy."
    )


def _in_words(state: State) -> str:
    return "no file" if state is None else f"{state[0]} bytes with SHA-256 {state[1]}"


def _names(folder: Path, below: str = "") -> list[str]:
    place = folder / below
    return sorted(os.listdir(place)) if place.is_dir() else []


def _states(name: str, states: Any) -> list[State]:
    """Read the states of a file in run.json."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} is not in the run")
    if not (isinstance(states, list) and states):
        raise ValueError(f"{name} has no state")
    return [None if state is None else _state(name, *state) for state in states]


def _state(name: str, num_bytes: Any, sha256: Any) -> tuple[int, str]:
    if not (type(num_bytes) is int and num_bytes >= 0 and isinstance(sha256, str)):
        raise ValueError(f"the state of {name} is {shorten([num_bytes, sha256])}")
    return num_bytes, sha256


def _read_old(folder: Path, data: bytes) -> str:
    """Read the run.json of a run from before there were checksums: the version that made it."""
    try:
        mark = dict(read_json(data))
        if mark.get("format") == 1 and mark.keys() <= {"format", "anybatch"}:
            return str(mark.get("anybatch"))
        what = "its checksum does not fit what it says"
    except (ValueError, TypeError) as error:
        what = str(error)
    raise RunError(
        f"{folder / MARK} is damaged: {what}. It must be a JSON object as the run wrote it. "
        f'Restore it from a copy. Without one, write {{"format": 1}} into it: the run goes on, '
        f"and the checksums of its files so far are lost."
    )


def seal(body: dict[str, Any]) -> bytes:
    """Write a JSON object with its checksum."""
    checksum = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "sha256": checksum})


def unseal(data: bytes) -> dict[str, Any] | None:
    """Read what `seal` has written, without the checksum; None if any byte of it differs."""
    try:
        body = dict(read_json(data))
        del body["sha256"]
        return body if seal(body) == data else None
    except (ValueError, KeyError, TypeError):
        return None  # no JSON, no object or no checksum


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
