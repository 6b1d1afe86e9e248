"""anybatch new FOLDER"""

import math
import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import Json

__all__ = ["run"]

TEMPLATES = Path(__file__).with_name("project")  # Python files have .txt appended
NUM_POINTS, LABELS = 100, ("red", "green", "blue")  # for each arm of the spiral


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    as_json: Json = False,
) -> None:
    """Write a small project that trains at once.

    It has a recipe, a model, a reader of data, a loss, a few data and a test. Replace them with
    your own, one after the other.
    """
    from anybatch.cli.next_steps import find_program
    from anybatch.cli.render import console, print_result, print_wrapped

    _check(folder)
    folder.mkdir(exist_ok=True)
    for name, text in _make_files(shlex.quote(str(folder))):
        (folder / name).write_text(text, encoding="utf8")
    _remember_code(folder)
    names = sorted(path.name for path in folder.iterdir())
    train = f"{find_program()} {shlex.join(['train', str(folder / 'recipe.toml')])}"
    test = shlex.join(["pytest", str(folder)])
    if as_json:
        print_result({"folder": str(folder), "files": names, "next": [train, test]}, as_json=True)
        return
    print_wrapped(f"{folder} has {', '.join(names)}.")
    console.print(f"\nNext:\n  {train}\n  {test}")


def _remember_code(folder: Path) -> None:
    """Allow the code of the new project: so far it is anybatch's own."""
    from anybatch.recipe.code import remember_code
    from anybatch.recipe.files import read_recipe

    remember_code([folder.absolute()], read_recipe(folder / "recipe.toml", []))


def _check(folder: Path) -> None:
    from anybatch.errors import RunError

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(
            f"{folder} exists already. Nothing in it was touched. Choose a folder that is new or "
            f"empty."
        )
    if not folder.absolute().parent.is_dir():
        raise RunError(f"{folder.parent} is no folder. Make it first, or choose another place.")


def _make_files(folder: str) -> Iterator[tuple[str, str]]:
    """Make the files of a project: name and text of each."""
    for template in sorted(TEMPLATES.iterdir()):
        text = template.read_text(encoding="utf8").replace("FOLDER", folder)
        yield template.name.removesuffix(".txt"), text
    yield "points.csv", "x,y,label\n" + "".join(f"{line}\n" for line in _draw_points())


def _draw_points() -> Iterator[str]:
    """Draw points along three spiral arms, the same each time."""
    draw = random.Random(0)
    for arm, label in enumerate(LABELS):
        for number in range(NUM_POINTS):
            radius = (number + 1) / NUM_POINTS
            angle = 4.2 * arm + 4 * radius + draw.gauss(0, 0.15)
            yield f"{radius * math.cos(angle):.4f},{radius * math.sin(angle):.4f},{label}"
