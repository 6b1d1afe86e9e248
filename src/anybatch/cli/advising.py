"""Advice on the batch size in the terminal: what is measured, and the plan."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anybatch.advice import measure, speed
from anybatch.advice.measure import Point
from anybatch.advice.pages import Plot, write_page
from anybatch.advice.plan import Plan, Range, Row
from anybatch.advice.plots import Band, chart
from anybatch.advice.reasons import advised, amount, mebibytes, points_in_words, reasons, table
from anybatch.advice.speed import Speed
from anybatch.cli.render import console, show, show_rows
from anybatch.cli.wrapping import wrap
from anybatch.errors import RecipeError
from anybatch.recipe.build import Built, build
from anybatch.recipe.code import may_import_again
from anybatch.recipe.runs import changed, compare_data, newest, read_recipe
from anybatch.runs.run import is_run

__all__ = ["conclude", "measured"]

FIGURES: dict[str, Callable[[Row], Range]] = {
    "steps": lambda row: row.steps,
    "examples": lambda row: row.examples,
    "time": lambda row: row.seconds,
}


def measured(
    source: str,
    changes: Sequence[str],
    *,
    num_updates: int,
    num_examples: int,
    price: float | None,
    allow_code: bool,
    accept_data: bool,
    quiet: bool,
) -> Plan:
    """Measure noise, speed and memory of a recipe or run, and say what comes out."""
    _check_price(price)
    folder = Path(source)
    if is_run(folder):
        built = _build_run(folder, changes, allow_code)
        num_steps = _num_updates(folder, built, accept_data=accept_data)
        found = measure.at_checkpoints(built, folder, num_examples)
    else:
        recipe, _, may = read_recipe(source, changes, allow_code=allow_code)
        built = build(recipe, allow_code=may)
        num_steps = built.order.num_steps(recipe.run.epochs)
        found = measure.along_training(built, min(num_updates, num_steps), num_examples)
    measure.check_noise(built)
    num_train = len(built.parts.train)
    points = [_told(point, _point, quiet) for point in found]
    speeds = [_told(one, _speed, quiet) for one in speed.speeds(built)]
    if not speeds:
        raise RecipeError(
            "a single example does not fit in memory, so that no batch size can be advised: take a "
            "smaller model, or another device by --set run.device=..."
        )
    return Plan(
        points=points,
        speeds=speeds,
        optimizer_seconds=speed.optimizer_seconds(built),
        steps=num_steps,
        batch=min(built.recipe.batch.size, num_train),
        num_examples=num_train,
        price_per_hour=price,
    )


def _build_run(folder: Path, changes: Sequence[str], allow_code: bool) -> Built:
    recipe = changed(folder, changes)
    may = may_import_again(folder, recipe, allow_code=allow_code)
    return build(recipe, allow_code=may, fresh=False)


def _num_updates(folder: Path, built: Built, *, accept_data: bool) -> int:
    """Count the updates of a run, and see that its data are those that are here."""
    found = newest(folder, built.recipe).checkpoint
    if found is None:
        return 0
    compare_data(folder, found, built, accept=accept_data)
    return found.step


def conclude(source: str, plan: Plan, html: Path | None, *, as_json: bool) -> None:
    """Print the plan, and write the page."""
    rows = [plan.row(batch) for batch in plan.batches]
    verdict, why = advised(plan), reasons(plan)
    if html is not None:
        title, plots = f"Batch size for {source}", _plots(plan, rows)
        write_page(html, title, why, plots, table(rows), verdicts=[verdict], command="advise")
    if as_json:
        show({"source": source, **_as_json(plan, rows), "reasons": [verdict, *why]}, as_json=True)
        return
    console.print(wrap(f"\n{verdict}", console.file))
    console.print(f"\nTo the loss of the recipe's own {plan.steps:,} updates of {plan.batch:,}:\n")
    show_rows(table(rows))
    console.print(f"\nOver those of batches of {plan.batch:,}, by batch size\n")
    lines = {name: band.middle for name, band in _bands(plan, rows).items()}
    for line in chart(lines, ("1", f"{plan.num_examples:,}")):
        console.print(line)
    console.print()
    for text in why:
        console.print(wrap(text, console.file))


def _check_price(price: float | None) -> None:
    if price is not None and not (math.isfinite(price) and price > 0):
        raise RecipeError(f"--price-per-hour: expected a number above 0, got {price}.")


def _told(found: Any, in_words: Callable[[Any], str], quiet: bool) -> Any:
    if not quiet:
        console.print(in_words(found))
    return found


def _point(point: Point) -> str:
    return f"noise scale {points_in_words([point])}"


def _speed(found: Speed) -> str:
    speed = amount(found.examples_per_second)
    return f"{found.micro_batch:,} at a time: {speed} examples/s, {mebibytes(found.peak_bytes)}"


def _bands(plan: Plan, rows: Sequence[Row]) -> dict[str, Band]:
    """Each figure over that of the recipe's own batch size, by batch size."""
    own = plan.row(plan.batch)
    found = {}
    for name, figure in FIGURES.items():
        ranges = [figure(row).times(1 / figure(own).value) for row in rows]
        found[name] = Band(
            middle=[r.value for r in ranges],
            low=[r.low for r in ranges],
            high=[r.high for r in ranges],
        )
    return found


def _plots(plan: Plan, rows: Sequence[Row]) -> list[Plot]:
    speeds = [one.examples_per_second for one in plan.speeds]
    return [
        Plot(
            title=f"Over those of batches of {plan.batch:,}, and between what they may lie",
            x=[row.batch for row in rows],
            x_name="batch size",
            y_name="times",
            bands=_bands(plan, rows),
            logarithmic=True,
        ),
        Plot(
            title="Throughput on this machine",
            x=[one.micro_batch for one in plan.speeds],
            x_name="examples at a time",
            y_name="examples a second",
            bands={"examples a second": Band(middle=speeds, low=speeds, high=speeds)},
            logarithmic=True,
        ),
    ]


def _as_json(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    smallest, largest = plan.advised
    low, high = plan.advised_at_most
    return {
        "advised": {"from": smallest, "to": largest, "at_least": low, "at_most": high},
        "steps": plan.steps,
        "batch": plan.batch,
        "num_examples": plan.num_examples,
        "noise_scale": [asdict(point) for point in plan.points],
        "critical_batch": asdict(plan.critical),
        "speeds": [asdict(one) for one in plan.speeds],
        "optimizer_seconds": plan.optimizer_seconds,
        "rows": [asdict(row) for row in rows],
    }
