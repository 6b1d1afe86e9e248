"""anybatch advise RECIPE or RUN"""

from typing import Annotated

import typer

from anybatch.cli.consent import ask_about_recipes
from anybatch.cli.options import AcceptData, AllowCode, Html, Json, Set, complete_recipe

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
        int,
        typer.Option("--updates", metavar="N", min=1, help="Updates of the trial training."),
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
    from anybatch.advice.plots import check_page
    from anybatch.cli.advising import conclude, measured

    check_page(html)
    ask_about_recipes([source], allow_code=allow_code, as_json=as_json)
    plan = measured(
        source,
        changes or [],
        num_updates=updates,
        num_examples=examples,
        price=price,
        allow_code=allow_code,
        accept_data=accept_data,
        quiet=as_json,
    )
    conclude(source, plan, html, as_json=as_json)
