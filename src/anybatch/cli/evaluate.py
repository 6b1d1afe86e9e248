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
    values = asdict(setup.evaluate(split.value))
    del values["loss"]  # it contains the penalty
    figures = setup.split_loss(values["parts"], values["num_examples"]) | values
    if not as_json and len(figures["parts"]) == 1:
        del figures["parts"]  # the only part is the loss
    origin = describe_origin(folder, setup, checkpoint)
    print_result({**origin, "split": split.value, **figures}, as_json=as_json)
