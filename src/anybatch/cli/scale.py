"""anybatch scale RECIPE"""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from anybatch.cli.options import AllowCode, Json, Set

__all__ = ["run"]


def run(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Examples of an update.")
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            metavar="auto|linear|sqrt|half-life|none",
            help="For the learning rate and what goes with it; auto: the optimiser's own.",
        ),
    ] = "auto",
    reduction: Annotated[
        str | None, typer.Option(metavar="sum|mean", help="Convert to this reduction.")
    ] = None,
    changes: Set = None,
    out: Annotated[Path | None, typer.Option("--out", help="File of the new recipe.")] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Carry a recipe to another batch size or reduction, and say what changed and why.

    The new recipe is printed with the table as its head, or written by --out.
    """
    from anybatch.recipe.results import write_new
    from anybatch.recipe.runs import read_recipe
    from anybatch.recipe.scaling import file_of, scale

    stated, _, may_import = read_recipe(recipe, changes or [], allow_code=allow_code)
    asked: Any = {"batch_size": batch_size, "rule": rule, "reduction": reduction}  # checked there
    done = scale(stated, **asked, allow_code=may_import)
    if out is not None:
        write_new(out, file_of(done).encode())
    _show(done, out, as_json=as_json)


def _show(done: Any, out: Path | None, *, as_json: bool) -> None:
    from dataclasses import asdict

    from anybatch.cli.output import say
    from anybatch.cli.render import console, show
    from anybatch.recipe.scaling import file_of, table_of

    if as_json:
        found = {"rule": done.rule, "changes": [asdict(change) for change in done.changes]}
        found |= {"warnings": done.warnings, "recipe": done.recipe.model_dump(mode="json")}
        show(found | ({"file": str(out)} if out is not None else {}), as_json=True)
    elif out is None:
        say(file_of(done), end="")
    else:
        for line in table_of(done):
            console.print(line.rstrip())
        console.print(f"\nWritten to {out}. Train it: anybatch train {shlex.quote(str(out))}")
