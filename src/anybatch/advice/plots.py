"""Curves as characters in a terminal, and as plots on a page that needs no network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from anybatch.errors import RunError
from anybatch.extras import import_for_pages
from anybatch.recipe.results import check_new_file
from anybatch.runs.disk import replace_file

__all__ = ["Band", "Plot", "check_page", "draw_chart", "write_page"]

WIDTH, HEIGHT = 64, 14  # characters of a chart
_LOG_RATIO = 10.0  # of the largest to the smallest value, from which an axis is logarithmic

_COLOURS = ("#0b5fb0", "#b4430c", "#5b6b1f", "#7a3e9d", "#6c7681", "#0f766e", "#a8710a")
_STYLE = Path(__file__).parents[1] / "report" / "templates" / "style.css"


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Curve with a lower and an upper bound."""

    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @classmethod
    def of(cls, places: Iterable[tuple[float, float, float]]) -> "Band":
        """Make a band of (middle, low, high) at each place."""
        middle, low, high = zip(*places, strict=True)
        return cls(middle=middle, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Curves over one axis."""

    title: str
    x: Sequence[float]
    x_name: str
    y_name: str
    bands: Mapping[str, Band]
    logarithmic: bool = False  # both axes


def draw_chart(
    curves: Mapping[str, Sequence[float]], ends: tuple[str, str], *, width: int = WIDTH
) -> list[str]:
    """Draw a chart for a terminal of any kind: a letter for each curve, * where some meet.

    The scale is logarithmic if all values are above 0 and span a factor of 10.

    Example:
        >>> lines = draw_chart({"loss": [2.0, 1.0]}, ("0", "100"), width=8)
        >>> lines[0], lines[-1]
        ('2 |A       ', 'A loss')

    Args:
        curves: values of each curve at equal distances.
        ends: text at the left and at the right end of the axis.
        width: characters of the axis.

    Returns:
        The lines, and below them which letter is which curve.
    """
    columns = {name: _interpolate(values, width) for name, values in curves.items()}
    every = np.concatenate(list(columns.values()))
    low, high = float(every.min()), float(every.max())
    logarithmic = low > 0 and high / low >= _LOG_RATIO
    cells = [[" "] * width for _ in range(HEIGHT)]
    for letter, values in zip(ascii_uppercase, columns.values(), strict=False):
        for column, value in enumerate(values):
            row = _find_row(float(value), low, high, logarithmic)
            cells[row][column] = letter if cells[row][column] == " " else "*"
    labels = {0: f"{high:.4g}", HEIGHT - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values()))
    rows = [f"{labels.get(i, ''):>{margin}} |{''.join(row)}" for i, row in enumerate(cells)]
    gap = max(width - len(ends[0]) - len(ends[1]), 1)
    rows.append(f"{'':>{margin}} +{'-' * width}")
    rows.append(f"{'':>{margin}}  {ends[0]}{' ' * gap}{ends[1]}")
    names = "   ".join(f"{letter} {name}" for letter, name in zip(ascii_uppercase, curves))  # noqa: B905
    return [*rows, names + ("   (logarithmic)" if logarithmic else "")]


def _interpolate(
    values: Sequence[float], width: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Interpolate a curve at the columns of a chart."""
    places = np.linspace(0, len(values) - 1, width)
    return np.interp(places, np.arange(len(values)), np.array(values, dtype=np.float64))


def _find_row(value: float, low: float, high: float, logarithmic: bool) -> int:
    """Find the row of a value, from 0 at the top."""
    if high == low:
        return HEIGHT // 2
    if logarithmic:
        share = math.log(value / low) / math.log(high / low)
    else:
        share = (value - low) / (high - low)
    return HEIGHT - 1 - round(share * (HEIGHT - 1))


def check_page(file: Path | None) -> None:
    """Check that a page can be written, before the work for it begins.

    Raises:
        RunError: the file exists, its folder does not, or plotly or jinja2 is not installed.
    """
    if file is None:
        return
    check_new_file(file, option="--html")
    import_for_pages("plotly", RunError)
    import_for_pages("jinja2", RunError)


def write_page(
    file: Path,
    title: str,
    texts: Sequence[str],
    plots: Sequence[Plot],
    rows: Sequence[Mapping[str, str]],
    *,
    verdicts: Sequence[str],
    command: str,
) -> None:
    """Write a page: title and verdicts, a table with a column for each key, plots, then texts."""
    check_page(file)
    jinja2 = import_for_pages("jinja2", RunError)
    plotly = import_for_pages("plotly.offline", RunError)
    markup = import_for_pages("markupsafe", RunError).Markup
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = (Path(__file__).parent / "templates" / "page.html").read_text(encoding="utf8")
    page = environment.from_string(template).render(
        title=title,
        command=command,
        verdicts=verdicts,
        texts=texts,
        rows=rows,
        style=markup(_STYLE.read_text(encoding="utf8")),
        library=markup(plotly.get_plotlyjs()),
        plots=[markup(_render_plot(plot)) for plot in plots],
    )
    replace_file(file, [page])


def _render_plot(plot: Plot) -> str:
    """Render a plot as HTML without the library.

    Plotly escapes what would end a script, and the names here contain no tags.
    """
    graphs = import_for_pages("plotly.graph_objects", RunError)
    figure = graphs.Figure()
    x = list(plot.x)
    for place, (name, band) in enumerate(plot.bands.items()):
        colour, name = _COLOURS[place % len(_COLOURS)], escape(name)
        line = {"color": colour}
        figure.add_scatter(
            x=x + x[::-1],
            y=[*band.high, *reversed(band.low)],
            fill="toself",
            fillcolor=colour,
            opacity=0.2,
            line={"width": 0},
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(x=x, y=list(band.middle), name=name, line=line, legendgroup=name)
    kind: dict[str, Any] = {"type": "log"} if plot.logarithmic else {}
    figure.update_layout(
        title=escape(plot.title),
        xaxis={"title": plot.x_name, **kind},
        yaxis={"title": plot.y_name, **kind},
        template="plotly_white",
        showlegend=True,
    )
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False}
    )
    return html
