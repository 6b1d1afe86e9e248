"""The question whether code that a run names may be imported, asked once on a terminal."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from anybatch.cli.ranks import under_torchrun

__all__ = ["ask_about_code", "ask_about_recipes"]


def ask_about_code(folder: Path, *, allow_code: bool, as_json: bool) -> None:
    """Ask on a terminal whether the code of a run may be imported, and remember a yes.

    Nobody is asked with --allow-code or --json, without a terminal, or where the answer was yes
    before and the files are the same; see `anybatch.recipe.code`. After a no the command is refused
    as without a terminal.
    """
    if allow_code or as_json or under_torchrun() or not _is_terminal():
        return
    from anybatch.recipe.code import files_of, is_remembered, remember
    from anybatch.recipe.names import names_code
    from anybatch.recipe.runs import recipe_of

    recipe = recipe_of(folder)
    if not names_code(recipe) or is_remembered(folder, recipe):
        return
    print(f"{shlex.quote(str(folder))} names code, which runs with your rights:", file=sys.stderr)
    for name, files in files_of(folder, recipe).items():
        where = ", ".join(map(str, files)) or "not found"
        print(f"  {ascii(name)[1:-1]}  {ascii(where)[1:-1]}", file=sys.stderr)
    print(
        "Import it, now and as long as these files are the same? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        remember(folder, recipe)


def ask_about_recipes(names: Sequence[str], *, allow_code: bool, as_json: bool) -> None:
    """Ask about each recipe that is, or lies in, the folder of a run."""
    for name in names:
        marked = [
            folder for folder in (Path(name), *Path(name).resolve().parents) if _is_run(folder)
        ]
        for folder in marked[:1]:
            ask_about_code(folder, allow_code=allow_code, as_json=as_json)


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "recipe.toml").is_file()


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
