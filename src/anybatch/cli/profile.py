"""anybatch profile RECIPE"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.consent import ask_about_recipes
from anybatch.cli.options import AllowCode, Json, RecipeName, Set

if TYPE_CHECKING:
    from anybatch.advice.profile import Profile

__all__ = ["run"]

NUM_OPERATORS = 8  # in the table


def run(
    recipe: RecipeName,
    changes: Set = None,
    updates: Annotated[
        int, typer.Option("--updates", metavar="N", min=1, help="Updates to time.")
    ] = 200,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write a flame graph.")
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Show where the time of an update goes.

    Trains the recipe for some updates in a temporary folder, and says which share of the time goes
    to data, passes, ledger, optimiser and records, and which operators of torch take longest.
    """
    from anybatch.advice.flame import draw_flame_graph
    from anybatch.advice.profile import measure_profile
    from anybatch.cli.render import print_result
    from anybatch.recipe.build import build
    from anybatch.recipe.results import check_new_file, write_new_file
    from anybatch.recipe.runs import load_recipe

    if svg is not None:
        check_new_file(svg, "--svg")
    ask_about_recipes([recipe], allow_code=allow_code, as_json=as_json)
    stated, _, allow_code = load_recipe(recipe, changes or [], allow_code=allow_code)
    profile = measure_profile(build(stated, allow_code=allow_code), updates)
    if svg is not None:
        title = f"An update of {recipe}: {1e3 * profile.seconds:.2f} ms"
        write_new_file(svg, draw_flame_graph(profile.stacks, title).encode())
    if as_json:
        print_result(_as_json(recipe, profile), as_json=True)
    else:
        _print_profile(profile, svg)


def _as_json(recipe: str, profile: "Profile") -> dict[str, object]:
    return {
        "recipe": recipe,
        "seconds": profile.seconds,
        "phases": dict(profile.phases),
        "operator_share": profile.operator_share,
        "operators": [
            {"name": one.name, "seconds": one.seconds, "calls": one.calls}
            for one in profile.operators
        ],
    }


def _print_profile(profile: "Profile", svg: Path | None) -> None:
    """Print the profile in words and tables."""
    from anybatch.cli.render import console, print_table, print_wrapped

    ms = 1e3 * profile.seconds
    largest = next(iter(profile.phases), "nothing")
    share = profile.operator_share
    text = (
        f"An update takes {ms:.2f} ms. Operators of torch take about {share:.0%} of it; the rest "
        f"is Python. Most of the time goes to: {largest}."
    )
    print_wrapped(text, "")
    print_table(
        [
            {"part": phase, "share": f"{part:.0%}", "ms": f"{ms * part:.2f}"}
            for phase, part in profile.phases.items()
        ]
    )
    print_table(
        [
            {
                "operator": one.name.removeprefix("aten::"),
                "calls": f"{one.calls:.0f}",
                "ms": f"{1e3 * one.seconds:.3f}",
            }
            for one in profile.operators[:NUM_OPERATORS]
        ]
    )
    if svg is not None:
        console.print(f"The flame graph is in {svg}")
