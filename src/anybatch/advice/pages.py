"""A result as one HTML file that needs nothing else: no network, no other file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from anybatch.advice.plots import Band
from anybatch.errors import RunError
from anybatch.extras import needed_for_pages
from anybatch.training.disk import replace_file

__all__ = ["Plot", "check_page", "write_page"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }
th { border-bottom: 1px solid; } td:first-child, th:first-child { text-align: left; }
</style>
<script>{{ library }}</script></head><body>
<h1>{{ title }}</h1>
{% for text in texts %}<p>{{ text }}</p>
{% endfor %}
{% for plot in plots %}{{ plot }}
{% endfor %}
<table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
</body></html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Curves over one axis."""

    title: str
    x: Sequence[float]
    x_name: str
    y_name: str
    bands: Mapping[str, Band]
    logarithmic: bool = False  # both axes


def check_page(file: Path | None) -> None:
    """See that a page can be written, before it is worked for.

    Raises:
        RunError: a file that exists, no folder for it, or plotly and jinja2 are not installed.
    """
    if file is None:
        return
    if os.path.lexists(file):
        raise RunError(f"{file} exists and is not written over: choose another name by --html.")
    if not file.absolute().parent.is_dir():
        raise RunError(f"{file.parent} is no folder, expected one to write {file.name} into.")
    needed_for_pages("plotly", RunError)
    needed_for_pages("jinja2", RunError)


def write_page(
    file: Path,
    title: str,
    texts: Sequence[str],
    plots: Sequence[Plot],
    rows: Sequence[Mapping[str, str]],
) -> None:
    """Write a page: a title, a few sentences, plots, and a table with a column a key."""
    check_page(file)
    jinja2, plotly = (
        needed_for_pages("jinja2", RunError),
        needed_for_pages("plotly.offline", RunError),
    )
    markup = needed_for_pages("markupsafe", RunError).Markup
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    page = template.render(
        title=title,
        texts=texts,
        rows=rows,
        library=markup(plotly.get_plotlyjs()),
        plots=[markup(_figure(plot)) for plot in plots],
    )
    replace_file(file, [page])


def _figure(plot: Plot) -> str:
    """As HTML without the library; plotly escapes what would end a script, and names hold no
    tags."""
    graphs = needed_for_pages("plotly.graph_objects", RunError)
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
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False}
    )
    return text
