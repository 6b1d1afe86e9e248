"""Documents say what the code does: examples run, tables are complete, links lead somewhere."""

import re
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


def test_the_first_python_block_of_the_readme_runs_and_learns(capsys):
    exec(compile(python_blocks(README)[0], "README.md", "exec"), {})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 40  # 10 epochs of 4 updates
    losses = [float(row.split()[1]) for row in rows]
    assert losses[-1] < losses[0]


def test_the_second_python_block_of_the_readme_sees_each_example(capsys):
    names = {}
    first, second = python_blocks(README)[:2]
    exec(compile(first, "README.md", "exec"), names)
    names["inputs"], names["targets"] = names["data"][0][:8], names["data"][1][:8]
    exec(compile(second, "README.md", "exec"), names)
    assert names["ledger"].norms.shape == (8,)
    assert (names["ledger"].norms > 0).all()


def test_the_readme_opens_with_the_five_questions_of_the_demo():
    table = README[: README.index("## What it is")]
    for answer in questions.ask():
        assert answer.question.replace("-2", "−2") in table
        assert answer.look in table


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
