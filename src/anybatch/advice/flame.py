"""Draw samples of stacks as a flame graph: an SVG file that needs nothing else.

A box is a function, as wide as its share of the samples. It stands on the function that calls it.
"""

from collections.abc import Mapping
from html import escape

__all__ = ["draw_flame_graph"]

WIDTH, ROW, LETTER = 1200, 18, 6.4  # pixels
_COLOURS = ("#f2b880", "#f0a868", "#f5c99a", "#eec07a")
_LEAST = 0.002  # share of a box that is drawn


def draw_flame_graph(stacks: Mapping[tuple[str, ...], int], title: str) -> str:
    """Draw stacks, from the outermost function at the bottom to the innermost at the top.

    Example:
        >>> svg = draw_flame_graph({("a", "b"): 3, ("a",): 1}, "an update")
        >>> svg.count("<rect"), "b: 75.0 %" in svg
        (3, True)

    Args:
        stacks: number of samples by stack.
        title: shown above.
    """
    total = max(sum(stacks.values()), 1)
    depth = max(map(len, stacks), default=0)
    height = (depth + 2) * ROW
    boxes = list(_list_boxes(stacks, 0, 0.0, total, height - ROW))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'font-family="monospace" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="4" y="13">{escape(title)}</text>',
            *boxes,
            "</svg>\n",
        ]
    )


def _list_boxes(
    stacks: Mapping[tuple[str, ...], int], level: int, left: float, total: int, bottom: float
) -> list[str]:
    """List the boxes of one level and of those above it, alphabetically."""
    groups: dict[str, dict[tuple[str, ...], int]] = {}
    for stack, count in stacks.items():
        if len(stack) > level:
            groups.setdefault(stack[level], {})[stack] = count
    boxes = []
    for name, group in sorted(groups.items()):
        count = sum(group.values())
        share = count / total
        if share >= _LEAST:
            boxes.append(_draw_box(name, level, left, share, bottom))
            boxes += _list_boxes(group, level + 1, left, total, bottom)
        left += share
    return boxes


def _draw_box(name: str, level: int, left: float, share: float, bottom: float) -> str:
    x, width, y = left * WIDTH, share * WIDTH, bottom - level * ROW
    colour = _COLOURS[sum(name.encode()) % len(_COLOURS)]
    label = name.rpartition(":")[2][: max(int(width / LETTER) - 1, 0)]
    return (
        f'<g><title>{escape(name)}: {100 * share:.1f} %</title><rect x="{x:.1f}" y="{y:.1f}" '
        f'width="{width:.1f}" height="{ROW - 1}" fill="{colour}"/><text x="{x + 2:.1f}" '
        f'y="{y + 12:.1f}">{escape(label)}</text></g>'
    )
