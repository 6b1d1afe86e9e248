"""Markdown tables, and the places in a document that they fill.

The prose of a document is written by hand. A table stands between two comments:

    <!-- table: NAME -->
    <!-- end of table -->
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["fill_tables", "format_ratio", "format_seconds", "format_table", "update_document"]

PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table of Markdown; short rows get empty cells."""
    full = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [
        "|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in [head, *full]
    ]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def format_seconds(seconds: float) -> str:
    """Format seconds as microseconds or, from ten milliseconds on, as milliseconds."""
    return f"{1e6 * seconds:,.0f} us" if seconds < 0.01 else f"{1e3 * seconds:,.1f} ms"


def format_ratio(ratio: float, aim: float | None = None) -> str:
    """Format a ratio, in bold if it misses its aim."""
    text = f"{ratio:.2f}"
    return text if aim is None or round(ratio, 2) <= aim else f"**{text}**"


def fill_tables(document: str, tables: Mapping[str, str], *, others: bool = False) -> str:
    """Return a document with its tables replaced.

    Args:
        others: whether the document has tables of other commands too, which stay.

    Raises:
        ValueError: the document has other tables.
    """
    names = [match[2] for match in PLACE.finditer(document)]
    if others:
        names = [name for name in names if name in tables]
    if sorted(names) != sorted(tables):
        raise ValueError(f"The document has the tables {names}. Expected: {list(tables)}.")
    return PLACE.sub(lambda m: m[1] + tables[m[2]] + m[3] if m[2] in tables else m[0], document)


def update_document(
    path: Path, tables: Mapping[str, str], plots: Mapping[str, str], *, others: bool = False
) -> None:
    """Replace the tables of a document and its plots, which are in a folder of the same name."""
    text = fill_tables(path.read_text(encoding="utf8"), tables, others=others)
    path.write_text(text, encoding="utf8")
    for name, svg in plots.items():
        (path.with_suffix("") / f"{name}.svg").write_text(svg, encoding="utf8")
