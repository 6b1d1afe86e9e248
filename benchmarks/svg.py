"""Draw line plots as SVG: axes, ticks, lines or marks, and a legend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Axis", "Series", "find_ticks", "plot"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 70, 230, 20, 55
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")


@dataclass(frozen=True, slots=True)
class Axis:
    """Axis of a plot, from its first tick to its last."""

    label: str
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return 0 at the first tick and 1 at the last; values beyond are drawn on the edge."""
        scale = math.log if self.is_log else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        inside = min(max(value, self.ticks[0]), self.ticks[-1])
        return (scale(inside) - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Series:
    """Line through points, or points as marks."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dash: str = ""  # of SVG, such as "5 4"
    marks: bool = False
    line: bool = True
    hollow: bool = False  # marks are rings


def find_ticks(low: float, high: float) -> list[float]:
    """Return ticks of a logarithmic axis from below the lowest to above the highest value.

    They are powers of ten over more than two decades, else 1, 2 and 5 times those.
    """
    steps = (1,) if high / low > 100 else (1, 2, 5)
    ticks = [0.0, *(step * 10.0**power for power in range(-6, 7) for step in steps), math.inf]
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    return ticks[first : last + 1]


def plot(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return the text of an SVG file."""
    inner = [*_frame(x, y)]
    for number, each in enumerate(series):
        inner += _draw(each, x, y) + _legend(each, number)
    body = "\n".join(inner)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<title>{escape(title)}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _at(x: Axis, y: Axis, point: tuple[float, float]) -> tuple[float, float]:
    across = LEFT + x.place(point[0]) * (WIDTH - LEFT - RIGHT)
    return across, HEIGHT - BOTTOM - y.place(point[1]) * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis) -> list[str]:
    """Draw grid, numbers and labels."""
    elements, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in x.ticks:
        across = _at(x, y, (tick, y.ticks[0]))[0]
        elements.append(_line([(across, TOP), (across, bottom)], "#dddddd"))
        elements.append(_text(across, bottom + 18, f"{tick:,g}", "middle"))
    for tick in y.ticks:
        height = _at(x, y, (x.ticks[0], tick))[1]
        elements.append(_line([(LEFT, height), (right, height)], "#dddddd"))
        elements.append(_text(LEFT - 8, height + 4, f"{tick:,g}", "end"))
    elements.append(_text((LEFT + right) / 2, HEIGHT - 12, x.label, "middle"))
    turned = f' transform="rotate(-90 16 {(TOP + bottom) / 2:g})"'
    elements.append(_text(16, (TOP + bottom) / 2, y.label, "middle", turned))
    return elements


def _draw(series: Series, x: Axis, y: Axis) -> list[str]:
    places = [_at(x, y, point) for point in series.points]
    colour = COLOURS[series.colour]
    elements = [_line(places, colour, series.dash, 2)] if series.line else []
    return elements + [_mark(place, colour, series.hollow) for place in places if series.marks]


def _legend(series: Series, number: int) -> list[str]:
    across, height, colour = WIDTH - RIGHT + 16, TOP + 12 + 20 * number, COLOURS[series.colour]
    elements = [_text(across + 34, height + 4, series.name, "start")]
    if series.line:
        elements.append(_line([(across, height), (across + 26, height)], colour, series.dash, 2))
    if series.marks:
        elements.append(_mark((across + 13, height), colour, series.hollow))
    return elements


def _line(
    places: Sequence[tuple[float, float]], colour: str, dash: str = "", width: int = 1
) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"'
        f"{dashed}/>"
    )


def _mark(place: tuple[float, float], colour: str, hollow: bool) -> str:
    paint = (
        f'r="6" fill="none" stroke="{colour}" stroke-width="2"'
        if hollow
        else f'r="4" fill="{colour}"'
    )
    return f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" {paint}/>'


def _text(across: float, height: float, text: str, anchor: str, more: str = "") -> str:
    place = f'x="{across:.1f}" y="{height:.1f}" text-anchor="{anchor}"{more}'
    return f"<text {place}>{escape(text)}</text>"
