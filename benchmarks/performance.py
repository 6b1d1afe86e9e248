"""Write the tables and plots of docs/performance.md from the raw results, and measure nothing.

    python benchmarks/performance.py

Each benchmark of the page has a function `format_tables`, and some have `draw_plots`. Both take its
raw results, as JSON has them. With `--write` a benchmark writes its own tables the same way.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from machine import RESULTS, write
from tables import update_document

DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
SOURCES: dict[str, tuple[str, ...]] = {
    "loop": ("loop",),
    "compiled": ("compiled",),
    "growth": ("growth",),
    "roofline": ("roofline",),
    "observed_step": ("observed_step", "observed_peers"),
    "bitwise": ("bitwise",),
    "self_check": ("self_check",),
    "before_after": (
        "before_after",
        "before_after_loop",
        "before_after_loop_fastest",
        "before_after_observed_step",
    ),
    "integrations": ("integrations",),
    "cost": ("cost_passes", "cost_start", "cost_memory", "cost_recipe"),
}
"""Raw results that each benchmark's tables show."""


def build_page(name: str, **changes: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tables and plots of a benchmark; changed results replace those of files."""
    module = import_module(name)
    raw = [
        changes.get(file) or json.loads((RESULTS / f"{file}.json").read_text())
        for file in SOURCES[name]
    ]
    draw = getattr(module, "draw_plots", None)
    return module.format_tables(*raw), draw(*raw) if draw else {}


def write_result(file: str, result: dict[str, Any]) -> Path:
    """Write a raw result, and the tables and plots that show it."""
    path = write(file, result)
    for name, files in SOURCES.items():
        if file in files:
            update_document(DOCUMENT, *build_page(name), others=True)
    return path


def main() -> None:
    tables: dict[str, str] = {}
    plots: dict[str, str] = {}
    for name in SOURCES:
        more_tables, more_plots = build_page(name)
        tables |= more_tables
        plots |= more_plots
    update_document(DOCUMENT, tables, plots)


if __name__ == "__main__":
    main()
