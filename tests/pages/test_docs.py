"""Documents say what the code does: tables are complete, links lead somewhere.

`test_documents.py` runs their blocks.
"""

import re
import runpy
from pathlib import Path

import pytest

from anybatch import questions
from anybatch.recipe.files import FREE
from anybatch.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_path_of_the_architecture_page_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = set(re.findall(r"\b([\w./]+(?:\.py|/))(?=[`<\",])", text))
    assert {"gradient/compute.py", "order/", "tests/unit/test_reductions.py"} < paths
    homes = (ROOT / "src" / "anybatch", ROOT)
    missing = [path for path in paths if not any((home / path).exists() for home in homes)]
    assert sorted(missing) == []


def test_the_workflow_calls_make_targets_that_exist():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = set(re.findall(r"run: make ([\w-]+)", workflow))
    assert {"check", "test"} < targets
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_readme_shows_what_its_first_example_prints(capsys):
    runpy.run_path(str(ROOT / "examples" / "one_update.py"), run_name="__main__")
    assert capsys.readouterr().out in README


def test_the_readme_is_short_and_answers_the_five_questions_of_the_demo():
    assert len(README.splitlines()) <= 130
    text = " ".join(README.split())
    for answer in questions.ask():
        assert answer.question.replace("-2", "−2") in text
        assert answer.look in text or answer.question.startswith(("Sum or mean", "How does back"))


def test_the_documents_name_every_command():
    heads = [path.read_text()[:60] for path in (ROOT / "src" / "anybatch" / "cli").glob("*.py")]
    commands = {match[1] for head in heads if (match := re.match(r'"""anybatch (\w+)', head))}
    assert {"train", "explain"} < commands
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    assert {name for name in commands if f"anybatch {name}" not in text} == set()


def test_contributing_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "src" / "anybatch"
    modules = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    modules |= {path.name for path in package.glob("[!_]*.py")}
    assert {"gradient/", "errors.py"} < modules
    assert modules == set(re.findall(r"`(\w+(?:/|\.py))`", text)) & modules


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


@pytest.mark.smoke
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_named_in_documents_exist(document):
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    files = re.findall(r"`(?:python )?((?:examples|benchmarks|recipes|tests)/[\w/.-]+)`", text)
    tests = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    missing = [name for name in re.findall(r"`(test_\w+\.py)`", text) if name not in tests]
    missing += [link for link in links if not leads_somewhere(document, link)]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert missing == []


def leads_somewhere(document: Path, link: str) -> bool:
    """Return whether a relative link names a file, and a heading of it after #."""
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


def anchors(markdown: str) -> list[str]:
    """Names that a document's headings get in links."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## Weights & Biases, `ab.Run`\n")
    links = [
        "page.md#weights--biases-abrun",
        "#weights--biases-abrun",
        "page.md",
        "#weights",
        "b.md",
    ]
    assert [leads_somewhere(page, link) for link in links] == [True, True, True, False, False]
