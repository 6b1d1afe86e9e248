"""What `anybatch explain` makes of LeNet on Fashion-MNIST: screenshots, and how long it takes.

LeNet of Caffe is trained for an epoch in batches of 256 images of 28x28, observed; then `anybatch
explain` makes the page of a step of it, and Chromium opens it in both widths and both themes. Whole
processes are timed, explain and evaluate in turn: evaluate loads the same run and data, and goes
over the 10,000 held-out images.

    python benchmarks/screenshots.py [--write]     # also writes docs/explain/*.png

Wants Debian's packages dataset-fashion-mnist and chromium.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from machine import write

FOLDER = Path(__file__).parents[1] / "docs" / "explain"
WIDTHS, THEMES = (1440, 375), ("light", "dark")
STEP, BATCH, ROUNDS = 200, 256, 3
OBSERVED = ("norms", "alignment", "share")


def anybatch(*arguments: object) -> dict[str, float]:
    """Seconds that a command takes, as a whole process, and those that a processor works on it."""
    code = "import sys; from anybatch.cli import main; main(sys.argv[1:])"
    begun, worked = time.perf_counter(), _processor_seconds()
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )
    taken = time.perf_counter() - begun
    return {"seconds": taken, "processor_seconds": _processor_seconds() - worked}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def trained(folder: Path) -> Path:
    """An observed run of one epoch."""
    run = folder / "lenet-fashion"
    settings = [f"batch.size={BATCH}", "run.epochs=1", "run.checkpoint_every=50", "run.keep=4"]
    settings += [f"observe.{name}=true" for name in OBSERVED]
    changes = [part for setting in settings for part in ("--set", setting)]
    anybatch("train", "caffe-lenet", "--out", run, *changes)
    return run


def timed(run: Path) -> tuple[Path, dict[str, Any]]:
    """The page, and seconds of explain and evaluate in turn."""
    taken: dict[str, list[dict[str, float]]] = {"explain": [], "evaluate": []}
    for number in range(ROUNDS):
        page = run / f"page-{number}.html"
        taken["explain"].append(anybatch("explain", run, "--step", STEP, "--out", page))
        taken["evaluate"].append(anybatch("evaluate", run))
    best = {name: min(one["seconds"] for one in every) for name, every in taken.items()}
    found = {"examples": BATCH, "step": STEP, "page_bytes": page.stat().st_size}
    return page, found | {"taken": taken, "ratio": best["explain"] / best["evaluate"]}


def opened(browser: Browser, file: Path, width: int, theme: str) -> Page:
    """A page with all that is in sight drawn."""
    page = browser.new_page(viewport={"width": width, "height": 1500}, color_scheme=theme)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector(".plot.drawn")
    page.wait_for_timeout(500)
    return page


def pictured(file: Path) -> dict[str, int]:
    """Screenshots of the head of the page, and of two sections; their sizes in bytes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for width in WIDTHS:
            for theme in THEMES:
                page = opened(browser, file, width, theme)
                page.screenshot(path=FOLDER / f"page-{width}-{theme}.png")
        page = opened(browser, file, WIDTHS[0], "light")
        _shot(page, "pooling")
        page.locator(".steps button", has_text="sum").click()
        page.locator("#stages").scroll_into_view_if_needed()
        page.wait_for_selector("#stages .sums .plot.drawn")
        page.wait_for_selector("#stages .bars .plot.drawn")
        _shot(page, "stages")
        browser.close()
    return {path.name: path.stat().st_size for path in sorted(FOLDER.glob("*.png"))}


def _shot(page: Page, section: str) -> None:
    """A section with some air around it."""
    box = page.locator(f"#{section}").evaluate(
        "one => { const b = one.getBoundingClientRect(); return [b.top + scrollY, b.height]; }"
    )
    clip = {"x": 80, "y": box[0], "width": WIDTHS[0] - 160, "height": box[1]}
    page.screenshot(path=FOLDER / f"{section}.png", full_page=True, clip=clip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page, result = timed(trained(Path(folder)))
        if options.write:
            result["screenshots"] = pictured(page)
            write("explain", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
