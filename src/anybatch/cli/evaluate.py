"""anybatch evaluate RUN"""

from anybatch.cli.consent import ask_about_code
from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder, SplitName, SplitOption

__all__ = ["run"]


def run(
    folder: RunFolder,
    split: SplitOption = SplitName.held_out,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Compute loss and metrics of a run's model.

    The model has the weights of the newest checkpoint that is whole.
    """
    from dataclasses import asdict

    from anybatch.cli.render import print_result
    from anybatch.recipe.results import describe_origin, restore_run

    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    setup, checkpoint = restore_run(folder, allow_code=allow_code, accept_data=accept_data)
    found = asdict(setup.evaluate(split.value))
    found = setup.split_loss(found["parts"]) | {k: v for k, v in found.items() if k != "loss"}
    if not as_json and len(found["parts"]) == 1:
        del found["parts"]  # it is the loss
    print_result(
        {**describe_origin(folder, setup, checkpoint), "split": split.value, **found},
        as_json=as_json,
    )
