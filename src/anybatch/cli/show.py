"""anybatch show RUN"""

from anybatch.cli.options import Json, RunFolder

__all__ = ["run"]

HIDDEN = ("epochs", "names_code", "has_ledger")  # of the overview, in the terminal


def run(folder: RunFolder, as_json: Json = False) -> None:
    """Show how far a run is, how good, and what to do next.

    Reads the records of the run. No model is built and no code of the run is imported.
    """
    from anybatch.cli.next_steps import list_next_steps
    from anybatch.cli.render import console, print_result
    from anybatch.cli.runs import count_epochs
    from anybatch.recipe.overview import describe_run

    overview = describe_run(folder)
    steps = list_next_steps(overview)
    if as_json:
        print_result({**overview, "next": steps}, as_json=True)
        return
    lines = {name: value for name, value in overview.items() if name not in HIDDEN}
    epochs = count_epochs(overview).removeprefix("epoch ")
    print_result({**lines, "epoch": epochs}, as_json=False)
    console.print("\nNext:")
    for step in steps:
        console.print(f"  {step}")
