"""Pictures of the course: lines, bars and maps, written as SVG with the standard library alone.

    place = left + (value - low) / (high - low) * width        logarithms first, on a log axis

A notebook shows a picture that is the last value of a cell. `save` writes it to a file as well.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["COLOURS", "Picture", "draw_bars", "draw_lines", "draw_map"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555")
LEFT, TOP, WIDE, HIGH = 70, 50, 480, 250  # the frame of a plot, in pixels
Points = Sequence[tuple[float, float]]


class Picture:
    """Canvas of a fixed size, in pixels from the upper left corner."""

    def __init__(self, width: float, height: float, title: str) -> None:
        """Make a white canvas with a title above."""
        self.size = f"0 0 {width:g} {height:g}"
        self.title = title
        self.elements = [f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>']
        self.write(16, 26, title, size=15)

    def write(
        self, x: float, y: float, text: str, anchor: str = "start", size: int = 12, turn: int = 0
    ) -> None:
        """Write one line of text."""
        self.elements.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'transform="rotate({turn} {x:.1f} {y:.1f})">{escape(text)}</text>'
        )

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""
        self.elements.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )

    def connect(self, points: Points, colour: str, width: float = 1, dash: str = "") -> None:
        """Connect points by a line."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            f'stroke-dasharray="{dash}"/>'
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        """Draw a dot."""
        self.elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def _repr_svg_(self) -> str:
        """Return the text of the SVG file; notebooks call this."""
        body = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{self.size}" '
            f'font-family="sans-serif">\n<title>{escape(self.title)}</title>\n{body}\n</svg>\n'
        )

    def save(self, name: str) -> "Picture":
        """Write the picture into the current folder, and return it."""
        Path(name).write_text(self._repr_svg_(), encoding="utf8")
        print(f"picture: {name}")
        return self


def draw_lines(
    title: str,
    lines: dict[str, Points],
    x: tuple[str, Sequence[float]],
    y: tuple[str, Sequence[float]],
    *,
    log: bool = False,
    dots: Sequence[str] = (),
) -> Picture:
    """Draw lines with a legend. Later lines are dashed, so that equal ones both show.

    Args:
        title: above the plot.
        lines: the points of each, by name.
        x: label and ticks; the axis goes from the first tick to the last.
        y: as x; values beyond the ticks are drawn on the edge.
        log: both axes are logarithmic.
        dots: names of the lines that are drawn as dots alone.
    """
    picture = Picture(LEFT + WIDE + 250, TOP + HIGH + 60, title)
    across, up = _scale(x[1], LEFT, WIDE, log), _scale(y[1], TOP + HIGH, -HIGH, log)
    for tick in x[1]:
        picture.connect([(across(tick), TOP), (across(tick), TOP + HIGH)], "#dddddd")
        picture.write(across(tick), TOP + HIGH + 18, f"{tick:g}", "middle")
    for tick in y[1]:
        picture.connect([(LEFT, up(tick)), (LEFT + WIDE, up(tick))], "#dddddd")
        picture.write(LEFT - 8, up(tick) + 4, f"{tick:g}", "end")
    picture.write(LEFT + WIDE / 2, TOP + HIGH + 42, x[0], "middle")
    picture.write(18, TOP + HIGH / 2, y[0], "middle", turn=-90)
    for number, (name, points) in enumerate(lines.items()):
        places = [(across(a), up(b)) for a, b in points]
        legend = LEFT + WIDE + 16, TOP + 12 + 22 * number
        picture.write(legend[0] + 34, legend[1] + 4, name)
        if name in dots:
            for place in [*places, (legend[0] + 13, legend[1])]:
                picture.dot(*place, COLOURS[number], radius=3)
        else:
            for path in (places, [legend, (legend[0] + 26, legend[1])]):
                picture.connect(path, COLOURS[number], width=2.5, dash="7 6" if number else "")
    return picture


def draw_bars(
    title: str, bars: dict[str, Sequence[float]], groups: Sequence[str], ticks: Sequence[float]
) -> Picture:
    """Draw one group of bars for each entry of the series, and a legend.

    Args:
        title: above the plot.
        bars: the series by name, each with one value a group.
        groups: names below the groups.
        ticks: of the vertical axis.
    """
    picture = Picture(LEFT + WIDE + 200, TOP + HIGH + 40, title)
    up = _scale(ticks, TOP + HIGH, -HIGH, log=False)
    for tick in ticks:
        colour = "#dddddd" if tick else "#555555"
        picture.connect([(LEFT, up(tick)), (LEFT + WIDE, up(tick))], colour)
        picture.write(LEFT - 8, up(tick) + 4, f"{tick:g}", "end")
    step = WIDE / len(groups)
    width = 0.8 * step / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        for group, value in enumerate(values):
            left = LEFT + step * (group + 0.1) + width * number
            top = min(up(value), up(0))
            picture.fill(left, top, width - 2, abs(up(value) - up(0)), COLOURS[number])
        legend = TOP + 12 + 22 * number
        picture.fill(LEFT + WIDE + 16, legend - 6, 14, 14, COLOURS[number])
        picture.write(LEFT + WIDE + 38, legend + 5, name)
    for group, name in enumerate(groups):
        picture.write(LEFT + step * (group + 0.5), TOP + HIGH + 20, name, "middle")
    return picture


def draw_map(
    picture: Picture,
    left: float,
    name: str,
    values: Sequence[Sequence[float]],
    *,
    dots: Sequence[int] = (),
    numbers: bool = False,
) -> None:
    """Draw a map of numbers as squares: the larger, the darker. Lines part windows of 2 x 2.

    Args:
        picture: to draw on.
        left: side of the map, in pixels.
        name: above the map.
        values: rows of numbers that are not negative.
        dots: squares with a dot, counted row by row from 0.
        numbers: write each number into its square.
    """
    cell, top, columns = 26, 70, len(values[0])
    picture.write(left, top - 8, name)
    largest = max(max(row) for row in values) or 1
    for place, value in enumerate(value for row in values for value in row):
        x, y = left + place % columns * cell, top + place // columns * cell
        grey = round(255 - 160 * value / largest)
        picture.fill(x, y, cell, cell, f"rgb({grey},{grey},255)")
        if place in dots:
            picture.dot(x + cell / 2, y + cell / 2, COLOURS[1])
        if numbers:
            picture.write(x + cell / 2, y + cell / 2 + 4, f"{value:.0f}", "middle")
    right, bottom = left + columns * cell, top + len(values) * cell
    for across in range(0, columns + 1, 2):
        picture.connect([(left + across * cell, top), (left + across * cell, bottom)], "#555555")
    for down in range(0, len(values) + 1, 2):
        picture.connect([(left, top + down * cell), (right, top + down * cell)], "#555555")


def _scale(
    ticks: Sequence[float], start: float, length: float, log: bool
) -> Callable[[float], float]:
    """Make the function from a value to its place in pixels."""
    place = math.log if log else float
    low, high = place(ticks[0]), place(ticks[-1])

    def scale(value: float) -> float:
        inside = min(max(value, ticks[0]), ticks[-1])
        return start + length * (place(inside) - low) / (high - low)

    return scale
