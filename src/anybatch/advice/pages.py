"""A result as one HTML file that needs nothing else: no network, no other file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from anybatch.advice.plots import Band
from anybatch.errors import RunError
from anybatch.extras import import_for_pages
from anybatch.training.disk import replace_file

__all__ = ["Plot", "check_page", "write_page"]

_COLOURS = ("#0b5fb0", "#b4430c", "#5b6b1f", "#7a3e9d", "#6c7681", "#0f766e", "#a8710a")
_PACKAGE = Path(__file__).parents[1]
_STYLE = _PACKAGE / "report" / "templates" / "style.css"  # shared with the page of `explain`


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
    """Write a page: title and verdicts, a table with a column a key, plots, then explanations."""
    check_page(file)
    jinja2 = import_for_pages("jinja2", RunError)
    plotly = import_for_pages("plotly.offline", RunError)
    markup = import_for_pages("markupsafe", RunError).Markup
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = (Path(__file__).parent / "templates" / "page.html").read_text(encoding="utf8")
    page = environment.from_string(text).render(
        title=title,
        command=command,
        verdicts=verdicts,
        texts=texts,
        rows=rows,
        style=markup(_STYLE.read_text(encoding="utf8")),
        library=markup(plotly.get_plotlyjs()),
        plots=[markup(_figure(plot)) for plot in plots],
    )
    replace_file(file, [page])


def _figure(plot: Plot) -> str:
    """As HTML without the library; plotly escapes what would end a script, and names hold no
    tags."""
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
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False}
    )
    return text
