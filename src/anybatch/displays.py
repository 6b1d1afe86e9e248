"""Tables of results in a notebook: HTML without scripts, all text escaped.

A notebook shows an object by the HTML that its method `_repr_html_` returns.
"""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["format_number", "make_table"]

CELL = 'style="text-align:left"'


def make_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table with a caption, a head and rows of text.

    Example:
        >>> make_table("Pets", ["name"], [["<Tom>"]]).count("&lt;Tom&gt;")
        1
    """
    lines = [
        "<table>",
        f'<caption style="text-align:left;font-weight:bold">{escape(caption)}</caption>',
        _make_row("th", head),
        *(_make_row("td", row) for row in rows),
        "</table>",
    ]
    return "\n".join(lines)


def format_number(value: float) -> str:
    """Format a number with four digits.

    Example:
        >>> format_number(0.123456), format_number(2.0)
        ('0.1235', '2')
    """
    return f"{value:.4g}"


def _make_row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind} {CELL}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"
