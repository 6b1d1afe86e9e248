"""anybatch advise RECIPE or RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AcceptData, AllowCode, Json, Set

__all__ = ["run"]


def run(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run's folder.")
    ],
    changes: Set = None,
    updates: Annotated[
        int, typer.Option("--updates", min=1, help="Of the short training of a recipe.")
    ] = 500,
    examples: Annotated[
        int, typer.Option("--examples", min=2, help="That each look at the noise rests on.")
    ] = 2048,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", help="Of this machine.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots.")] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Which batch size: steps, examples, time and cost to the same loss, predicted.

    From the noise scale along a short training of a recipe, or at the checkpoints of a run, and
    the speed and memory of updates on this machine.
    """
    from anybatch.advice.pages import check_page
    from anybatch.cli.advising import conclude, measured

    check_page(html)
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
