"""Find the spikes in the records of a run."""

from pathlib import Path
from typing import Any

from anybatch.displays import format_number
from anybatch.errors import RunError
from anybatch.recipe.runs import check_run
from anybatch.runs.records import read_recipe_records

__all__ = ["find_spike"]


def find_spike(folder: Path, step: int | None = None) -> tuple[int, str]:
    """Find a spike of a run, and say in words what it was.

    Args:
        step: of the spike; None: the newest one.

    Returns:
        The step, and a text that names the examples.
    """
    check_run(folder)
    records = read_recipe_records(folder / "records.jsonl")
    rows = [row for row in records if row["kind"] == "spike"]
    matches = [row for row in rows if step is None or row["step"] == step]
    if not matches:
        steps = ", ".join(str(row["step"]) for row in rows[-5:])
        others = f"The last ones are at the steps {steps}." if rows else "It has none at all."
        where = "" if step is None else f" at step {step}"
        raise RunError(
            f"{folder} has no record of a spike{where}. {others} A run watches for spikes if its "
            f"recipe says so: --set spikes.window=100."
        )
    row = matches[-1]
    return row["step"], _describe(row)


def _describe(row: dict[str, Any]) -> str:
    names = {"loss": "loss", "norm": "norm of the gradient", "example": "largest loss"}
    signal = names[row["signal"]]
    text = (
        f"This step is shown because its {signal} is a spike: {_format(row['value'])}, after a "
        f"median of {_format(row['median'])} in the steps before."
    )
    ids = ", ".join(str(example["id"]) for example in row["examples"])
    return f"{text} Behind it: example {ids}." if ids else f"{text} No example stands out."


def _format(number: float | None) -> str:
    return "not finite" if number is None else format_number(number)
