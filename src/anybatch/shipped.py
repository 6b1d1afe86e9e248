"""Recipes that come with the package: files by name, and a line that describes each.

This imports nothing, so that the shell's completion answers at once.
"""

from itertools import takewhile
from pathlib import Path

__all__ = ["recipe_files", "summary_of"]


def recipe_files() -> dict[str, Path]:
    """List the shipped recipes: each file by its name.

    Example:
        >>> "lenet-digits" in recipe_files()
        True
    """
    here = Path(__file__).parent
    folders = (here / "recipes", here.parents[1] / "recipes")  # installed, or in a checkout
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}


def summary_of(file: Path) -> str:
    """Read the first paragraph of the comment at the head of a recipe.

    Example:
        >>> summary_of(recipe_files()["lenet-digits"])
        "LeNet on scikit-learn's handwritten digits: what `anybatch demo` trains."
    """
    lines = file.read_text(encoding="utf8").splitlines()
    paragraph = takewhile(lambda line: line.startswith("# "), lines)
    return " ".join(line.removeprefix("# ") for line in paragraph)
