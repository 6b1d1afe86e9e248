"""A real browser, headless: Debian's Chromium, driven by Playwright, without a network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
NO_BROWSER = (
    "a page is opened in Chromium by Playwright: apt install chromium, pip install playwright"
)


@dataclass
class PageLog:
    """Messages and requests of a page since it was opened."""

    complaints: list[str] = field(default_factory=list)  # errors and warnings of the console
    requests: list[str] = field(default_factory=list)  # beside the file itself


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium; skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip(NO_BROWSER)
    playwright = pytest.importorskip("playwright.sync_api", reason=NO_BROWSER)
    with playwright.sync_playwright() as running:
        result = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield result
        finally:
            result.close()


@contextmanager
def open_page(
    result: Any, file: Path, *, width: int = 1440, theme: str = "light", **others: Any
) -> Iterator[tuple[Any, PageLog]]:
    """A page that has been opened from the disk, as by a double click, and is ready."""
    viewport = {"width": width, "height": 900}
    page, calls = result.new_page(viewport=viewport, color_scheme=theme, **others), PageLog()
    page.on("console", lambda message: _note(calls, message))
    page.on("pageerror", lambda error: calls.complaints.append(str(error)))
    page.on("request", lambda request: calls.requests.append(request.url))
    page.set_default_timeout(60_000)
    page.goto(file.resolve().as_uri())
    page.wait_for_selector("html[data-ready]")
    calls.requests.remove(file.resolve().as_uri())
    try:
        yield page, calls
    finally:
        page.close()


DRAWN = "one => one.classList.contains('drawn')"


def draw_all(page: Any) -> int:
    """Scroll to each chart until it is drawn; how many there are."""
    charts = page.locator(".plot")
    for k in range(charts.count()):
        if charts.nth(k).is_visible():
            charts.nth(k).scroll_into_view_if_needed()
            page.wait_for_function(DRAWN, arg=charts.nth(k).element_handle())
    return int(charts.count())


def _note(calls: PageLog, message: Any) -> None:
    if message.type in ("error", "warning"):
        calls.complaints.append(message.text)


CONTRAST = """() => {
  const parse = (text) => {
    const canvas = document.createElement("canvas"); canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = text; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => {
    const of = (x) => (x <= 10.31475 ? x / 3294.6 : ((x / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * of(r) + 0.7152 * of(g) + 0.0722 * of(b);
  };
  const mixed = (over, under) => under.map((x, i) => over[i] * over[3] + x * (1 - over[3]));
  const hidden = "script, style, noscript, :disabled, .skip, .hidden";
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((under, over) => mixed(over, under), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim();
    const element = walker.currentNode.parentElement;
    const isSeen = element.checkVisibility({ visibilityProperty: true });
    if (!text || !isSeen || element.closest(hidden)) continue;
    const style = getComputedStyle(element);
    const isDrawn = element instanceof SVGElement;
    const under = ground(isDrawn ? element.closest(".plot") : element);
    const over = mixed(parse(isDrawn ? style.fill : style.color), under);
    const [a, b] = [light(over), light(under)].sort((x, y) => y - x);
    found.push({ text: text.slice(0, 40), ratio: (a + 0.05) / (b + 0.05), tag: element.tagName });
  }
  return found;
}"""
"""All text that is visible, and its contrast to what is behind it, by the formula of WCAG 2.1."""
