"""anybatch predict RUN"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from anybatch.cli.consent import ask_about_code
from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder, SplitName, SplitOption

__all__ = ["run"]


def run(
    folder: RunFolder,
    split: SplitOption = SplitName.held_out,
    num_rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=1, help="Print a table of N examples.")
    ] = 20,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write a line of JSON for every example."),
    ] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Print what a run's model predicts for each example.

    Classes have the names that data.args.labels of the recipe gives them. --json prints one object
    with the outputs for every example as its "predictions".
    """
    from anybatch.cli.render import format_json, print_result
    from anybatch.recipe.results import (
        describe_origin,
        predict_examples,
        restore_run,
        write_new_file,
    )

    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    setup, checkpoint = restore_run(folder, allow_code=allow_code, accept_data=accept_data)
    rows = list(predict_examples(setup, split.value))
    result = {**describe_origin(folder, setup, checkpoint), "split": split.value}
    if out is not None:
        write_new_file(out, "".join(f"{format_json(row)}\n" for row in rows).encode())
        print_result({**result, "file": str(out), "examples": len(rows)}, as_json=as_json)
    elif as_json:
        print_result({**result, "predictions": rows}, as_json=True)
    else:
        _print(result, rows, num_rows)


def _print(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], num_rows: int) -> None:
    from anybatch.cli.render import console, print_result, print_table

    print_result(result, as_json=False)
    print_table([_choose_cells(row) for row in rows[:num_rows]])
    if all({"class", "target"} <= row.keys() for row in rows):
        right = sum(row["class"] == row["target"] for row in rows)
        console.print(f"{right:,} of {len(rows):,} examples are predicted right.")
    if len(rows) > num_rows:
        console.print(f"{len(rows) - num_rows:,} more examples: --rows N, --json or --out FILE")


def _choose_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what to show of an example."""
    cells = {"example": row["example"]}
    if "target" in row:
        cells["target"] = row.get("target_label", _shorten(row["target"]))
    if "class" not in row:
        return {**cells, "output": _shorten(row["outputs"])}
    cells["predicted"] = row.get("label", row["class"])
    if "probability" in row:
        cells["probability"] = f"{row['probability']:.3f}"
    if "target" in row:
        cells["is right"] = row["class"] == row["target"]
    return cells


def _shorten(value: Any) -> Any:
    """Show at most four numbers of a tensor."""
    flat = value
    while isinstance(flat, list) and flat and isinstance(flat[0], list):
        flat = [number for inner in flat for number in inner]
    if not isinstance(flat, list):
        return flat
    text = ", ".join(f"{number:.4g}" for number in flat[:4])
    return text if len(flat) <= 4 else f"{text}, and {len(flat) - 4} more"
