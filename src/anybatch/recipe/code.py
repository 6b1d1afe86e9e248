"""User code that a recipe names: where it is looked up, and whether it may be imported.

| recipe | its code is imported |
|---|---|
| a file outside of any run, code in the current folder | yes: it is the user's own |
| any, with --allow-code | yes |
| any, after the user said yes on a terminal | yes, as long as the files are the same |
| any, otherwise | no |

The answers of the user are in `~/.local/state/anybatch/code.json` ($XDG_STATE_HOME), never in a
folder of a run or recipe: each name with its files and their SHA-256. So a run from someone else
cannot bring its own consent along. A user without a home says --allow-code.

Code is looked up in the current folder, and then in the folder of the recipe. Code in a model's
folder (`trust_remote_code`) needs --allow-code each time. A run records where its code was, and
its SHA-256.
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
from anybatch.recipe.schema import ModelSection, Recipe
from anybatch.runs.disk import replace_file
from anybatch.runs.records import read_records

__all__ = [
    "check_code",
    "find_code_files",
    "find_memory_folder",
    "has_code",
    "has_remote_code",
    "hash_code",
    "is_code",
    "is_remembered",
    "list_code",
    "list_code_folders",
    "list_foreign_code",
    "permit_code",
    "remember_code",
]

_log = logging.getLogger(__name__)


def is_code(name: str) -> bool:
    """Return whether a name in a recipe is the user's own code."""
    return ":" in name


def has_code(recipe: Recipe) -> bool:
    """Return whether a recipe names any code of the user."""
    return bool(list_code(recipe)) or has_remote_code(recipe.model)


def has_remote_code(section: ModelSection) -> bool:
    """Return whether a model asks to run the code in its own folder."""
    return section.args.get("trust_remote_code", False) is not False


def list_code(recipe: Recipe) -> list[str]:
    """List the names in a recipe that are the user's own code."""
    sections = (recipe.model, recipe.data, recipe.optimizer, recipe.order)
    names: list[Any] = [*(section.name for section in sections), recipe.objective.loss]
    reduction = recipe.objective.reduction
    if isinstance(reduction, str) or "name" in reduction:
        reduction = {"data": reduction}
    for term in reduction.values():
        names.append(term.get("name") if isinstance(term, dict) else term)
    return [name for name in names if isinstance(name, str) and is_code(name)]


def list_foreign_code(recipe: Recipe, folder: Path) -> list[str]:
    """List the code that a recipe names and that is not in the current folder.

    A recipe from a stranger could otherwise call `os:system`, or anything that is installed.
    """
    names = [name for name in list_code(recipe) if not _is_in_current_folder(name, folder)]
    return [*names, *(["model.args.trust_remote_code"] if has_remote_code(recipe.model) else [])]


def _is_in_current_folder(name: str, folder: Path) -> bool:
    """Return whether an import would find a module directly in the current folder, or nowhere."""
    root = name.partition(":")[0].partition(".")[0]
    if root in sys.builtin_module_names:
        return False
    spec = PathFinder.find_spec(root, [os.getcwd(), str(folder), *sys.path])
    if spec is None:
        return root not in sys.modules  # if it cannot be imported, it is refused later
    places = spec.submodule_search_locations or [spec.origin or ""]
    return all(os.path.isabs(place) and Path(place).parent == Path.cwd() for place in places)


def permit_code(
    folder: Path, recipe: Recipe, *, allow_code: bool, warn_of_changes: bool = True
) -> bool:
    """Decide whether the code of a run may be imported. If so, let imports find it.

    Args:
        warn_of_changes: whether to warn of code that has changed since the run was made.
    """
    if not has_code(recipe):
        return allow_code
    folders = list_code_folders(folder)
    if not (allow_code or is_remembered(folders, recipe)):
        return False
    _extend_path(folders)
    for name, (file, sha256) in _read_code_record(folder).items() if warn_of_changes else ():
        if Path(file).is_file() and _hash_file(Path(file)) != sha256:
            _log.warning("%s has changed since %s was made: %s", name, folder, file)
    return True


def check_code(folder: Path, recipe: Recipe, *, allow_code: bool) -> None:
    """Check that the code of a recipe outside of any run may be imported. Let imports find it.

    Raises:
        RecipeError: it names code that is neither the user's own nor allowed.
    """
    names = [] if allow_code else list_foreign_code(recipe, folder)
    if names and not is_remembered([folder], recipe):
        raise RecipeError(
            f"the recipe names the code {names[0]!r}, which does not lie in the folder that you "
            f"are in. Such code runs only with --allow-code. Repeat with it if you trust whoever "
            f"wrote the recipe."
        )
    if has_code(recipe):
        _extend_path([folder])


def _extend_path(folders: Sequence[Path]) -> None:
    """Let imports search folders, after the current folder."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    index = sys.path.index("") + 1
    sys.path[index:index] = [str(folder) for folder in folders if str(folder) not in sys.path]


def hash_code(recipe: Recipe) -> dict[str, list[str]]:
    """Return file and SHA-256 of each module that a recipe names. They must be imported."""
    modules = {name.partition(":")[0] for name in list_code(recipe)}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)}
    return {name: [file, _hash_file(Path(file))] for name, file in files.items() if file}


def find_code_files(folders: Sequence[Path], recipe: Recipe) -> dict[str, list[Path]]:
    """Find the files that importing each name would run, without importing any.

    Args:
        folders: where the code may be, in addition to the current folder.
    """
    places = [os.getcwd(), *map(str, folders), *sys.path]
    modules = {name: name.partition(":")[0] for name in list_code(recipe)}
    return {name: list(_find_module_files(module, places)) for name, module in modules.items()}


def _find_module_files(module: str, places: Sequence[str]) -> Iterator[Path]:
    """Find the files of a module and of the packages that it is in."""
    path, names = list(places), module.split(".")
    for depth in range(1, len(names) + 1):
        spec = PathFinder.find_spec(".".join(names[:depth]), path)
        if spec is None:
            return
        if spec.origin is not None:
            yield Path(spec.origin)
        path = list(spec.submodule_search_locations or [])


def is_remembered(folders: Sequence[Path], recipe: Recipe) -> bool:
    """Return whether the user said yes to all code of a recipe, with these very files."""
    memory = _read_memory()
    return not has_remote_code(recipe.model) and all(
        files and memory.get(name) == _hash_files(files)
        for name, files in find_code_files(folders, recipe).items()
    )


def remember_code(folders: Sequence[Path], recipe: Recipe) -> None:
    """Remember that the user said yes to all code of a recipe, with these very files."""
    files = find_code_files(folders, recipe)
    memory = _read_memory() | {name: _hash_files(paths) for name, paths in files.items()}
    if (folder := find_memory_folder()) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "code.json", [json.dumps(memory, indent=1), "\n"])


def find_memory_folder() -> Path | None:
    """Find the folder of the answers; None for a user without a home."""
    return find_user_folder("XDG_STATE_HOME", ".local/state")


def _read_memory() -> dict[str, Any]:
    """Read what is remembered; nothing if the file is damaged."""
    if (folder := find_memory_folder()) is None:
        return {}
    try:
        memory = json.loads((folder / "code.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def list_code_folders(folder: Path) -> list[Path]:
    """List the folders that held the code of a run when it was made."""
    folders: list[Path] = []
    for name, (file, _) in _read_code_record(folder).items():
        depth = name.count(".") + (Path(file).name == "__init__.py")
        folders += Path(file).parents[depth : depth + 1]
    return list(dict.fromkeys(folders))


def _read_code_record(folder: Path) -> Mapping[str, Sequence[str]]:
    """Read what a run records of its code: file and SHA-256 of each module."""
    rows = read_records(folder / "records.jsonl")
    record: Any = next((row["code"] for row in reversed(rows) if "code" in row), {})
    is_valid = isinstance(record, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
        for entry in record.values()
    )
    return record if is_valid else {}


def _hash_files(files: Sequence[Path]) -> dict[str, str]:
    return {str(file.resolve()): _hash_file(file) for file in files}


def _hash_file(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
