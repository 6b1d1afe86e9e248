"""Help texts: whole sentences, no word cut at 80 columns, one form of arguments, exit codes.

Oracle: the docstrings and options as they stand in the source, read by `ast`, which knows nothing
of typer or rich.
"""

import ast
import re
from pathlib import Path

import pytest
import typer

import anybatch.cli
from anybatch.cli.app import COMMANDS
from command_line import anybatch as call
from command_line import run_command

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def source_of(name: str) -> ast.FunctionDef:
    """Return the function `run` of a command, as it is written."""
    tree = ast.parse((Path(anybatch.cli.__file__).parent / f"{name}.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef))


def words(text: str) -> str:
    return " ".join(text.split())


def cut_words(help_text: str, sentences: list[str]) -> list[str]:
    """Return the sentences that a help text does not hold whole."""
    return [one for one in sentences if words(one) not in words(help_text)]


def test_the_list_of_commands_has_the_whole_first_sentence_of_each() -> None:
    listed = run_command("--help").out
    for name in NAMES:
        first = (ast.get_docstring(source_of(name)) or "").split("\n")[0]
        assert re.search(rf"^  {name} +{re.escape(first)}$", listed, re.M), name


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_is_its_docstring_in_whole_sentences(name: str) -> None:
    display = run_command(name, "--help").out
    docstring = ast.get_docstring(source_of(name)) or ""
    assert cut_words(display, docstring.split("\n\n")) == []
    for paragraph in docstring.split("\n\n"):
        assert re.match(r"[-A-Z].*[.:]$", words(paragraph)), paragraph
    assert max(map(len, display.splitlines())) <= 80
    assert "..." not in display.replace("RECIPE...", "")
    assert "<" not in display  # no type in place of a name


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained_by_a_sentence(name: str) -> None:
    helps = [
        ast.literal_eval(keyword.value)
        for node in ast.walk(source_of(name))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "help"
    ]
    display = run_command(name, "--help").out
    assert cut_words(display, helps) == []
    assert [one for one in helps if not one.endswith(".")] == []


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_named_run_or_recipe_in_capitals(name: str) -> None:
    usage = run_command(name, "--help").out.splitlines()[0]
    arguments = usage.removeprefix(f"Usage: anybatch {name} [OPTIONS]").split()
    assert set(arguments) <= {"RUN", "RECIPE", "RECIPE...", "RECIPE|RUN", "FOLDER", "[FOLDER]"}


@pytest.mark.parametrize("arguments", [[], *([name] for name in NAMES)])
def test_every_help_lists_the_exit_codes(arguments: list[str]) -> None:
    display = run_command(*arguments, "--help").out
    assert re.findall(r"^    (\d+) ", display, re.M) == ["0", "2", "130", "143", "1"]


def test_the_default_of_typer_would_cut_words() -> None:  # the control
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(lambda: None)
    app.command(name="examples", help="Reads the ledger that [observe] keeps.")(lambda: None)
    from typer.testing import CliRunner

    display = CliRunner().invoke(app, ["--help"]).output
    assert cut_words(display, ["Reads the ledger that [observe] keeps."])


def test_the_version_is_printed() -> None:
    assert run_command("--version").out == f"anybatch {anybatch.__version__}\n"


def test_a_usage_error_names_the_command_and_its_help() -> None:
    ended = call("train")
    assert ended.code == 2
    assert "Usage: anybatch train [OPTIONS] RECIPE" in ended.err
    assert "Missing argument 'RECIPE'" in ended.err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("anybatch tr", {"train"}),
        ("anybatch train len", {"lenet-digits"}),
        ("anybatch evaluate runs/m", {"runs/mine-1"}),
        ("anybatch train --se", {"--set", "--seeds"}),
    ],
)
def test_the_shell_completes_commands_recipes_and_runs(
    typed: str, offered: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine-1").mkdir(parents=True)
    Path("runs/mine-1/run.json").write_text("{}")
    Path("runs/notes").mkdir()
    monkeypatch.setenv("_ANYBATCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert {word.strip() for word in call().out.split()} >= offered
