"""Documents say what the code does: examples run, tables are complete, links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

from anybatch import questions
from anybatch.recipe.files import FREE
from anybatch.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_blocks_of_the_readme_run_and_print_what_it_shows(capsys):
    names, (first, *others) = {}, python_blocks(README)
    exec(compile(first, "README.md", "exec"), names)
    shown = re.search(r"```\n(100: .*?)```", README, re.DOTALL)
    assert shown is not None
    assert capsys.readouterr().out == shown[1]
    for block in others:
        exec(compile(block, "README.md", "exec"), names)
    assert names["ledger"].norms.shape == (50,)


def test_the_readme_shows_what_its_first_example_prints(capsys):
    runpy.run_path(str(ROOT / "examples" / "one_update.py"), run_name="__main__")
    assert capsys.readouterr().out in README


def test_the_readme_is_short_and_answers_the_five_questions_of_the_demo():
    assert len(README.splitlines()) <= 130
    text = " ".join(README.split())
    for answer in questions.ask():
        assert answer.question.replace("-2", "−2") in text
        assert answer.look in text or answer.question.startswith(("Sum or mean", "How does back"))


def test_every_key_of_a_recipe_is_in_the_table_and_no_other():
    table = (ROOT / "docs" / "recipes.md").read_text()
    named = set(re.findall(r"`(\w+\.\w+)`", "".join(re.findall(r"^\| ([^|]*) \|", table, re.M))))
    declared = {
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key in field.annotation.model_fields
    }
    assert named == declared


def test_the_keys_that_the_table_calls_free_are_those_that_may_change():
    table = (ROOT / "docs" / "recipes.md").read_text()
    free = {row.split("`")[1] for row in table.splitlines() if re.search(r"\bfree \|$", row)}
    assert free == set(FREE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_named_in_documents_exist(document):
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    files = re.findall(r"`(?:python )?((?:examples|benchmarks|recipes|tests)/[\w/.-]+)`", text)
    files += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)]
    missing = [name for name in links if not (document.parent / name).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert missing == []
