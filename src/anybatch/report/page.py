"""Render the figures of an update as one HTML file.

    page = template (Jinja2, all text escaped) + figures as JSON + a script for each section

Plotly draws charts with axes: a reader can zoom into them and read off points. Its script takes 2
MB of the file, compressed. The browser starts it after everything else is on the screen. Graphics
without axes (arrows, bars, maps of pixels, windows) are plain HTML, SVG and canvas.

A content security policy forbids loading anything from outside, and running any script but those
whose SHA-256 it names. So nothing in the data can run. Styles are not restricted like this, because
Plotly writes some of its own; they cannot load anything either.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from anybatch.errors import ModelError
from anybatch.extras import import_for_pages
from anybatch.report.packing import embed_json

__all__ = ["render_page"]

TEMPLATES = Path(__file__).with_name("templates")
WRONG_IDEAS = Path(__file__).with_name("wrong_ideas.json")
"""Figures of `anybatch.questions.wrong_ideas`, which take some seconds to measure."""

SCRIPTS = (
    "core",
    "charts",
    "pictures",
    "examples",
    "hero",
    "compare",
    "start",
    "firsts",
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


def render_page(sections: Mapping[str, Any], *, plotly: bytes | None = None) -> str:
    """Render the page.

    Args:
        sections: the figures, see `describe_sections`; a section that is None is left out.
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
    library = _read_plotly() if plotly is None else plotly
    text: str = environment.get_template("page.html").render(
        about=sections["about"],
        titles={name: title for name, title in SECTIONS.items() if sections[name] is not None},
        policy=_make_policy([*(script.encode() for script in scripts), library]),
        ideas=json.loads(WRONG_IDEAS.read_text(encoding="utf8")),
        data=jinja2.utils.markupsafe.Markup(embed_json(sections)),
        scripts=[jinja2.utils.markupsafe.Markup(script) for script in scripts],
        style=jinja2.utils.markupsafe.Markup((TEMPLATES / "style.css").read_text(encoding="utf8")),
        plotly=_compress(library),
    )
    return text


def _make_policy(scripts: list[bytes]) -> str:
    """Write a policy that lets these scripts run, and no others."""
    hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )


def _read_plotly() -> bytes:
    script: bytes = import_for_pages("plotly.offline", ModelError).get_plotlyjs().encode()
    return script


@lru_cache(maxsize=1)
def _compress(script: bytes) -> str:
    """Compress a script, as base64."""
    return base64.b64encode(zlib.compress(script, 9)).decode()
