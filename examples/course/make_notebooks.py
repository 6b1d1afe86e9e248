"""Make a notebook of each chapter: `python examples/course/make_notebooks.py`.

    # %% [markdown]     begins a cell of text, whose lines are comments
    # %%                begins a cell of code

Editors know these marks too. Notebooks are JSON, so no other package is needed.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def read_cells(text: str) -> list[tuple[str, str]]:
    """Split a script into cells: pairs of "markdown" or "code" and the text of the cell."""
    _, *parts = MARK.split(text)
    cells = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        lines = body.strip().split("\n")
        if mark:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append(("markdown" if mark else "code", "\n".join(lines)))
    return cells


def make_notebook(text: str) -> str:
    """Make the text of the notebook of a script."""
    cells = []
    for number, (kind, body) in enumerate(read_cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        code = {"execution_count": None, "outputs": []} if kind == "code" else {}
        cells.append(cell | code | {"source": body.splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for script in sorted(FOLDER.glob("[0-9]_*.py")):
        notebook = make_notebook(script.read_text(encoding="utf8"))
        script.with_suffix(".ipynb").write_text(notebook, encoding="utf8")
        print(script.with_suffix(".ipynb").name)
