"""anybatch advise RECIPE or RUN"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.consent import ask_about_recipes
from anybatch.cli.options import AcceptData, AllowCode, Html, Json, Set, complete_recipe

if TYPE_CHECKING:
    from anybatch.advice.plan import Plan

__all__ = ["run"]

Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|RUN",
        help="A recipe, or the folder of a run.",
        autocompletion=complete_recipe,
    ),
]


def run(
    source: Source,
    changes: Set = None,
    updates: Annotated[
        int, typer.Option("--updates", metavar="N", min=1, help="Updates of the trial training.")
    ] = 500,
    examples: Annotated[
        int,
        typer.Option("--examples", metavar="N", min=2, help="Examples of each noise measurement."),
    ] = 2048,
    price: Annotated[
        float | None,
        typer.Option("--price-per-hour", metavar="PRICE", help="Price of this machine."),
    ] = None,
    html: Html = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Recommend a batch size for a recipe or a run.

    Measures the noise of the gradient, and the speed and memory of updates on this machine. A
    recipe is trained for a moment; a run is measured at its checkpoints. The table predicts steps,
    examples, time and cost to the same training loss for each batch size.
    """
    from anybatch.advice.plan import measure_plan
    from anybatch.advice.plots import check_page
    from anybatch.advice.reasons import describe_measurement
    from anybatch.cli.render import console

    check_page(html)
    ask_about_recipes([source], allow_code=allow_code, as_json=as_json)
    plan = measure_plan(
        source,
        changes or [],
        num_updates=updates,
        num_examples=examples,
        price=price,
        allow_code=allow_code,
        accept_data=accept_data,
        report=lambda one: None if as_json else console.print(describe_measurement(one)),
    )
    _print_plan(source, plan, html, as_json=as_json)


def _print_plan(source: str, plan: "Plan", html: Path | None, *, as_json: bool) -> None:
    """Print the plan, and write the page."""
    from anybatch.advice import reasons
    from anybatch.advice.plots import write_page
    from anybatch.cli.render import console, print_chart, print_result, print_table, print_wrapped

    verdict, texts = reasons.recommend(plan), reasons.list_reasons(plan)
    table = reasons.make_table(plan.rows)
    if html is not None:
        title, plots = f"Batch size for {source}", reasons.make_plots(plan)
        write_page(html, title, texts, plots, table, verdicts=[verdict], command="advise")
    if as_json:
        result = {"source": source, **plan.as_json(), "reasons": [verdict, *texts]}
        print_result(result, as_json=True)
        return
    print_wrapped(f"\n{verdict}")
    console.print(f"\nTo the loss of the recipe's own {plan.steps:,} updates of {plan.batch:,}:\n")
    print_table(table)
    console.print(f"\nRelative to batches of {plan.batch:,}, by batch size\n")
    print_chart(reasons.make_bands(plan), ("1", f"{plan.num_examples:,}"))
    print_wrapped(*texts)
