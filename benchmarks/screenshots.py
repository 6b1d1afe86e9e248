"""Make a sample page of `anybatch explain` and pictures of pages, or time a page.

    python benchmarks/screenshots.py           # docs/sample-page.html and docs/explain/*.png
    python benchmarks/screenshots.py --time    # benchmarks/results/explain.json

The sample is a small LeNet on digits. Its charts use Plotly's basic build, which npm fetches, so
that the file stays under 1 MB. The pictures are of Caffe's LeNet on Fashion-MNIST, in batches of
256 images, opened in a headless Chromium.

--time times whole processes of explain and evaluate in turn. Both load the same run and data, and
evaluate goes over the 10,000 held-out images.

Needs Debian's packages dataset-fashion-mnist, chromium and npm.
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
from plotly.offline import get_plotlyjs_version

from anybatch.report.page import render_page
from anybatch.report.runs import explain_run
from machine import write

DOCS = Path(__file__).parents[1] / "docs"
FOLDER, SAMPLE = DOCS / "explain", DOCS / "sample-page.html"
WIDTHS, THEMES = (1440, 375), ("light", "dark")
FASHION = ("batch.size=256", "run.epochs=1", "run.checkpoint_every=50", "run.keep=4")
DIGITS = ("batch.size=32", "run.epochs=5")
STEP, ROUNDS = 200, 3
OBSERVED = ("observe.norms=true", "observe.alignment=true", "observe.share=true")


def anybatch(*arguments: object) -> dict[str, float]:
    """Run a command as a process, and return its seconds and processor seconds."""
    code = "import sys; from anybatch.cli import main; main(sys.argv[1:])"
    start, worked = time.perf_counter(), _processor_seconds()
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "processor_seconds": _processor_seconds() - worked}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(recipe: str, run: Path, *settings: str) -> Path:
    """Train a recipe, observed."""
    changes = [part for setting in (*settings, *OBSERVED) for part in ("--set", setting)]
    anybatch("train", recipe, "--out", run, *changes)
    return run


def write_sample(folder: Path) -> None:
    """Write the sample page, with the small build of Plotly."""
    package = f"plotly.js-basic-dist-min@{get_plotlyjs_version()}"
    subprocess.run(["npm", "install", "--silent", "--prefix", folder, package], check=True)
    script = next(folder.glob("node_modules/*/plotly-basic.min.js")).read_bytes()
    explanation, _ = explain_run(train("lenet-digits", folder / "lenet-digits", *DIGITS))
    SAMPLE.write_text(render_page(explanation.sections, plotly=script), encoding="utf8")


def time_commands(run: Path) -> dict[str, Any]:
    """Time explain and evaluate in turn."""
    times: dict[str, list[dict[str, float]]] = {"explain": [], "evaluate": []}
    for number in range(ROUNDS):
        page = run / f"page-{number}.html"
        times["explain"].append(anybatch("explain", run, "--step", STEP, "--out", page))
        times["evaluate"].append(anybatch("evaluate", run))
    best = {name: min(one["seconds"] for one in every) for name, every in times.items()}
    result = {"examples": 256, "step": STEP, "page_bytes": page.stat().st_size}
    return result | {"taken": times, "ratio": best["explain"] / best["evaluate"]}


def open_page(browser: Browser, file: Path, width: int, theme: str) -> Page:
    """Open a page, and wait until its head is drawn; charts below it are drawn when they show."""
    page = browser.new_page(viewport={"width": width, "height": 1500}, color_scheme=theme)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_timeout(500)
    return page


def take_pictures(file: Path) -> None:
    """Take pictures of the head of a page, in both themes, and of two sections."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for width in WIDTHS:
            for theme in THEMES:
                page = open_page(browser, file, width, theme)
                page.screenshot(path=FOLDER / f"page-{width}-{theme}.png")
        page = open_page(browser, file, WIDTHS[0], "light")
        page.locator(".steps button", has_text="sum").click()
        for chart in ("sums", "bars"):
            page.locator(f"#stages .{chart} .plot").first.scroll_into_view_if_needed()
            page.wait_for_selector(f"#stages .{chart} .plot.drawn")
        _picture(page, "stages")
        _picture(page, "pooling")
        browser.close()


def _picture(page: Page, section: str) -> None:
    """Take a picture of a section with a margin."""
    box = page.locator(f"#{section}").evaluate(
        "one => { const b = one.getBoundingClientRect(); return [b.top + scrollY, b.height]; }"
    )
    clip = {"x": 80, "y": box[0], "width": WIDTHS[0] - 160, "height": box[1]}
    page.add_style_tag(content="nav.sections, #pair { position: static !important }")
    page.screenshot(path=FOLDER / f"{section}.png", full_page=True, clip=clip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = train("caffe-lenet", Path(folder) / "lenet-fashion", *FASHION)
        if options.time:
            result = time_commands(run)
            write("explain", result)
            print(json.dumps(result, indent=1))
            return
        anybatch("explain", run, "--out", run / "page.html")
        take_pictures(run / "page.html")
        write_sample(Path(folder))
    for path in (SAMPLE, *sorted(FOLDER.glob("*.png"))):
        print(f"{path.stat().st_size:>9,}  {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
