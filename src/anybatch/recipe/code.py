"""Code that a recipe names: where it is looked up, and whether it may be imported.

| recipe | its code is imported |
|---|---|
| a file outside of any run, code in the folder that the user is in | yes: it is the user's own |
| any, with --allow-code | yes |
| any, after the user said yes on a terminal | yes, as long as the files are the same |
| any, otherwise | no |

What the user said yes to is kept in `~/.local/state/anybatch/code.json` ($XDG_STATE_HOME), never in
a folder of a run or recipe: each name with its files and their SHA-256. So a run of somebody else
cannot bring its own consent along. A user without a home says --allow-code.

Code is looked up in the folder that the user is in, and then in the folder of the recipe. Code that
lies in a model's folder (`trust_remote_code`) needs --allow-code each time. A run records where its
code was and its SHA-256.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from anybatch.errors import RecipeError
from anybatch.paths import find_user_folder
from anybatch.recipe.names import code_names, names_code, names_elsewhere, trusts_remote_code
from anybatch.recipe.schema import Recipe
from anybatch.training.disk import replace_file
from anybatch.training.records import read_records

__all__ = [
    "check_code",
    "code_of",
    "consent_folder",
    "files_of",
    "is_remembered",
    "may_import",
    "may_import_again",
    "places_of_run",
    "remember",
]

_log = logging.getLogger(__name__)


def may_import(folder: Path, recipe: Recipe, *, allow_code: bool) -> bool:
    """Decide whether the code that a run names may be imported; if so, let it be found.

    Args:
        folder: the run.
        recipe: its recipe.
        allow_code: whether the user said so for this command.
    """
    places = places_of_run(folder)
    if not names_code(recipe) or not (allow_code or is_remembered(places, recipe)):
        return allow_code
    _search(places)
    return True


def check_code(folder: Path, recipe: Recipe, *, allow_code: bool) -> None:
    """See that the code that a recipe outside of any run names may be imported; let it be found.

    Args:
        folder: where the recipe lies.
        recipe: the recipe.
        allow_code: whether the user said so for this command.

    Raises:
        RecipeError: it names code that is neither the user's own nor allowed.
    """
    names = [] if allow_code else names_elsewhere(recipe, folder)
    if names and not is_remembered([folder], recipe):
        raise RecipeError(
            f"the recipe names the code {names[0]!r}, which does not lie in the folder that you "
            f"are in. Such code runs only with --allow-code. Repeat with it if you trust whoever "
            f"wrote the recipe."
        )
    if names_code(recipe):
        _search([folder])


def may_import_again(folder: Path, recipe: Recipe, *, allow_code: bool) -> bool:
    """Decide as `may_import` for a run that goes on or is looked at, and warn of code that is
    another than it was."""
    may = may_import(folder, recipe, allow_code=allow_code)
    for name, (file, sha256) in _recorded(folder).items() if may else ():
        if Path(file).is_file() and _hash(Path(file)) != sha256:
            _log.warning("%s has changed since %s was made: %s", name, folder, file)
    return may


def _search(folders: Sequence[Path]) -> None:
    """Let imports look into folders, after the folder that the user is in."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    at = sys.path.index("") + 1
    sys.path[at:at] = [str(folder) for folder in folders if str(folder) not in sys.path]


def code_of(recipe: Recipe) -> dict[str, list[str]]:
    """List the modules that a recipe names, once imported: file and SHA-256 of each."""
    modules = {name.partition(":")[0] for name in code_names(recipe)}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)}
    return {name: [file, _hash(Path(file))] for name, file in files.items() if file is not None}


def files_of(folders: Sequence[Path], recipe: Recipe) -> dict[str, list[Path]]:
    """Find the files that importing each name would run, without importing any.

    Args:
        folders: where the code may lie, besides the folder that the user is in.
        recipe: the recipe that names it.
    """
    places = [os.getcwd(), *map(str, folders), *sys.path]
    return {name: list(_files(name.partition(":")[0], places)) for name in code_names(recipe)}


def is_remembered(folders: Sequence[Path], recipe: Recipe) -> bool:
    """Check whether the user said yes to all code of a recipe, with files as they are now."""
    known = _read_memory()
    return not trusts_remote_code(recipe.model) and all(
        files and known.get(name) == _hashes(files)
        for name, files in files_of(folders, recipe).items()
    )


def remember(folders: Sequence[Path], recipe: Recipe) -> None:
    """Keep that the user said yes to all code of a recipe, with files as they are now."""
    known = _read_memory()
    known |= {name: _hashes(files) for name, files in files_of(folders, recipe).items()}
    if (folder := consent_folder()) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "code.json", [json.dumps(known, indent=1), "\n"])


def consent_folder() -> Path | None:
    """Return the folder in which a yes is kept; None for a user without a home."""
    return find_user_folder("XDG_STATE_HOME", ".local/state")


def _read_memory() -> dict[str, Any]:
    """Read what is remembered; nothing if the file is damaged."""
    if (folder := consent_folder()) is None:
        return {}
    try:
        found = json.loads((folder / "code.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def places_of_run(folder: Path) -> list[Path]:
    """List the folders in which the code of a run was when it was made."""
    found: list[Path] = []
    for name, (file, _) in _recorded(folder).items():
        depth = name.count(".") + (Path(file).name == "__init__.py")
        found += Path(file).parents[depth : depth + 1]
    return list(dict.fromkeys(found))


def _recorded(folder: Path) -> Mapping[str, Sequence[str]]:
    rows = read_records(folder / "records.jsonl")
    found: Any = next((row["code"] for row in reversed(rows) if "code" in row), {})
    is_plain = isinstance(found, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
        for entry in found.values()
    )
    return found if is_plain else {}


def _files(module: str, places: Sequence[str]) -> Iterator[Path]:
    """Find the files of a module and of the packages that it is in."""
    path, parts = list(places), module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return
        if spec.origin is not None:
            yield Path(spec.origin)
        path = list(spec.submodule_search_locations or [])


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    return {str(file.resolve()): _hash(file) for file in files}


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
