"""anybatch demo"""

from anybatch.cli.options import Json

__all__ = ["run"]


def run(as_json: Json = False) -> None:
    """Answer five questions by measurement, then train on digits.

    After Ctrl-C the training is saved, and the last line says how to continue.
    """
    from anybatch import questions
    from anybatch.cli.render import console, show_answers
    from anybatch.cli.session import follow, fresh_folder
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import begun, read_recipe

    answers = questions.ask()
    if not as_json:
        show_answers(answers)
        console.print(
            "\nLeNet on handwritten digits of 8x8. Its two 5x5 convolutions are padded "
            "by 2, so that there is something left to pool. Each example's gradient norm is kept: "
            "'anybatch examples' with the run's folder lists those that drive it.\n"
        )
    recipe, _, may_import = read_recipe("lenet-digits", ["observe.norms=true"], allow_code=False)
    follow(
        build(recipe, allow_code=may_import),
        begun(recipe, fresh_folder("demo")),
        as_json=as_json,
        also={"answers": [answer._asdict() for answer in answers]},
    )
