"""anybatch evaluate RUN"""

from anybatch.cli.options import AcceptData, AllowCode, Json, Part, RunFolder, Split

__all__ = ["run"]


def run(
    folder: RunFolder,
    split: Split = Part.held_out,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Loss and metrics of a run's model on a part of its data."""
    from dataclasses import asdict

    from anybatch.cli.render import show
    from anybatch.recipe.results import restored, weights_of

    built, checkpoint = restored(folder, allow_code=allow_code, accept_data=accept_data)
    found = asdict(built.evaluated(split.value))
    origin = {"run": str(folder), "step": checkpoint.step, "weights": weights_of(built)}
    show({**origin, "split": split.value, **found}, as_json=as_json)
