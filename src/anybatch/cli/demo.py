"""anybatch demo"""

from pathlib import Path

from anybatch.cli.options import Json

__all__ = ["run"]


def run(as_json: Json = False) -> None:
    """Answer five questions by measurement, then train on digits.

    Six wrong ideas are measured as well. Ends with the page of one update of that run. After
    Ctrl-C the training is saved, and the last line says how to continue.
    """
    from anybatch import questions
    from anybatch.cli.next_steps import find_program
    from anybatch.cli.render import console, print_answers, print_wrong_ideas
    from anybatch.cli.session import choose_folder, train_and_report
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import create_run, load_recipe

    answers, ideas = questions.ask(), questions.wrong_ideas()
    if not as_json:
        print_answers(answers)
        print_wrong_ideas(ideas)
        console.print(
            "Now a real run: LeNet learns 1,797 handwritten digits of 8x8 pixels. The norm of each "
            "example's gradient is kept.\n",
            soft_wrap=False,
        )
    recipe, _, may_import = load_recipe("lenet-digits", ["observe.norms=true"], allow_code=False)
    folder = choose_folder("demo")
    also = {
        "answers": [answer._asdict() for answer in answers],
        "wrong_ideas": [idea._asdict() for idea in ideas],
    }
    setup, opening = build(recipe, allow_code=may_import), create_run(recipe, folder)
    train_and_report(setup, opening, as_json=as_json, also=also, tell_next=False)
    if not as_json:
        page, program = _write_page(folder), find_program()
        console.print(f"\nThe page of one update, for a browser:\n  {page.absolute().as_uri()}")
        console.print("\nNext:")
        for command, purpose in (
            (f"{program} examples {folder}", "the examples that drive the run"),
            (f"{program} predict {folder}", "each held-out example, and the guess"),
            (f"{program} scale lenet-digits --batch-size 512", "the recipe at another batch size"),
        ):
            console.print(f"  {command}\n      {purpose}")


def _write_page(folder: Path) -> Path:
    """Write the page of an update of the run, and return its file."""
    from anybatch.recipe.results import write_new_file
    from anybatch.report.runs import explain_run

    page, step = explain_run(folder, allow_code=False)
    file = folder / f"explain-step-{step}.html"
    write_new_file(file, page.html.encode())
    return file
