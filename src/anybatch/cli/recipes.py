"""anybatch recipes"""

from anybatch.cli.options import Json

__all__ = ["run"]


def run(as_json: Json = False) -> None:
    """List the recipes that come with anybatch.

    Those whose names end in -digits train on data that scikit-learn brings, and need no download.
    """
    from rich.table import Table

    from anybatch.cli.render import console, print_result
    from anybatch.shipped import recipe_files, summary_of

    summaries = {name: summary_of(file) for name, file in sorted(recipe_files().items())}
    if as_json:
        rows = [{"name": name, "summary": summary} for name, summary in summaries.items()]
        print_result({"recipes": rows}, as_json=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, summary in summaries.items():
        table.add_row(name, summary)
    console.print(table, soft_wrap=False)
    console.print("\nTrain one: anybatch train lenet-digits")
