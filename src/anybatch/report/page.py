"""One HTML file from the figures of an update.

    page = template (Jinja2, all text escaped) + figures as JSON + a script for each section

Charts with axes are drawn by Plotly: one can zoom into them and read off points. Its script takes
2 MB of the file, compressed. The browser starts it once everything else is on the screen. What
needs no axes (arrows, bars, maps of pixels, windows) is plain HTML, SVG and canvas.

A content security policy forbids to load anything from outside, and to run any script but those
whose SHA-256 it names. So nothing that the data say can run. Styles are not confined like this,
because Plotly writes some of its own; they can load nothing either.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from anybatch.errors import ModelError
from anybatch.extras import import_for_pages
from anybatch.report.packing import embedded

__all__ = ["page"]

TEMPLATES = Path(__file__).with_name("templates")
SCRIPTS = (
    "core",
    "charts",
    "pictures",
    "examples",
    "hero",
    "compare",
    "stages",
    "layers",
    "reductions",
    "pooling",
    "noise",
    "run",
    "main",
)
"""Modules in the order in which they run. One with the name of a section needs that section."""

SECTIONS = {
    "stages": "Step by step",
    "examples": "The examples",
    "layers": "Where it goes",
    "reductions": "Sum or mean",
    "pooling": "Max-pooling",
    "noise": "Noise",
    "run": "The run",
}
"""Titles of the sections, in the order of the page."""


def page(sections: Mapping[str, Any], *, plotly: bytes | None = None) -> str:
    """Make the page.

    Args:
        sections: the figures, see `sections`. One that is None is left out.
        plotly: a smaller build of Plotly's script, with scatter plots and bars; None: all of it.

    Raises:
        ModelError: jinja2 or plotly cannot be imported.
    """
    jinja2 = import_for_pages("jinja2", ModelError)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [name for name in SCRIPTS if name not in SECTIONS or sections[name] is not None]
    scripts = [(TEMPLATES / "js" / f"{name}.js").read_text(encoding="utf8") for name in names]
    library = _plotly() if plotly is None else plotly
    hashes = [_hash(script) for script in (*(one.encode() for one in scripts), library)]
    text: str = environment.get_template("page.html").render(
        about=sections["about"],
        titles={name: title for name, title in SECTIONS.items() if sections[name] is not None},
        policy=_policy(hashes),
        data=jinja2.utils.markupsafe.Markup(embedded(sections)),
        scripts=[jinja2.utils.markupsafe.Markup(script) for script in scripts],
        style=jinja2.utils.markupsafe.Markup((TEMPLATES / "style.css").read_text(encoding="utf8")),
        plotly=_packed(library),
    )
    return text


def _policy(hashes: list[str]) -> str:
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )


def _hash(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _plotly() -> bytes:
    script: bytes = import_for_pages("plotly.offline", ModelError).get_plotlyjs().encode()
    return script


@lru_cache(maxsize=1)
def _packed(script: bytes) -> str:
    """Compress a script, as base64."""
    return base64.b64encode(zlib.compress(script, 9)).decode()
