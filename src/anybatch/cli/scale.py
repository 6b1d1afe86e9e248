"""anybatch scale RECIPE"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli.consent import ask_about_recipes
from anybatch.cli.options import AllowCode, Json, RecipeName, Set

if TYPE_CHECKING:
    from anybatch.recipe.scaling import ScaledRecipe

__all__ = ["run"]


def run(
    recipe: RecipeName,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="The new number of examples of an update."),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            metavar="RULE", help="auto (the optimiser's own), linear, sqrt, half-life or none."
        ),
    ] = "auto",
    reduction: Annotated[
        str | None, typer.Option(metavar="NAME", help="Convert to this reduction: sum or mean.")
    ] = None,
    changes: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File of the new recipe.")
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Rescale a recipe to another batch size or reduction.

    Prints the new recipe, or writes it to --out. A table at its head says what changed and why.
    """
    from anybatch.recipe.results import write_new_file
    from anybatch.recipe.runs import load_recipe
    from anybatch.recipe.scaling import format_file, scale

    ask_about_recipes([recipe], allow_code=allow_code, as_json=as_json)
    original, _, allow_code = load_recipe(recipe, changes or [], allow_code=allow_code)
    options: Any = {"batch_size": batch_size, "rule": rule, "reduction": reduction}  # checked there
    scaled = scale(original, **options, allow_code=allow_code)
    if out is not None:
        write_new_file(out, format_file(scaled).encode())
    _print_scaled(scaled, out, as_json=as_json)


def _print_scaled(scaled: "ScaledRecipe", out: Path | None, *, as_json: bool) -> None:
    from dataclasses import asdict

    from anybatch.cli.output import print_text
    from anybatch.cli.render import console, print_result
    from anybatch.recipe.scaling import format_file, format_table

    if as_json:
        result: dict[str, Any] = {
            "rule": scaled.rule,
            "changes": [asdict(change) for change in scaled.changes],
            "warnings": scaled.warnings,
            "recipe": scaled.recipe.model_dump(mode="json"),
        }
        print_result(result | ({} if out is None else {"file": str(out)}), as_json=True)
    elif out is None:
        print_text(format_file(scaled), end="")
    else:
        for line in format_table(scaled):
            console.print(line.rstrip())
        console.print(f"\nWritten to {out}. Train it: anybatch train {shlex.quote(str(out))}")
