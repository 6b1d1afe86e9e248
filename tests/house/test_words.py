"""Plain words: names and first words of docstrings, read off the syntax tree.

A function is a verb and a noun, so no participle begins its name. A variable is called by its
content, not by how it came. A docstring begins with a verb, or with the noun that a class, property
or module is. An error says what is expected in a sentence of its own.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "benchmarks", "examples", "tests")
FILES = sorted(
    file
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*.py")
    if file != Path(__file__)  # which has the words themselves
)
# fmt: off
PARTICIPLES = {
    "told", "met", "made", "known", "ready", "mapped", "kept", "joined", "carried", "found",
    "seen", "given", "own", "gone", "held", "taken", "brought", "drawn", "written", "shown",
    "chosen", "begun", "broken", "laid", "put", "sent", "spent", "built", "bound", "born", "lost",
    "meant", "paid", "said", "sealed", "stilled", "worn",
}
OF_THE_FIELD = {  # words that end in -ed and name a thing or a property of the field
    "embed", "seed", "need", "feed", "speed", "red", "shed", "unembed", "proceed", "exceed",
    "succeed", "hundred", "indeed", "weed", "weighted", "shared", "sharded", "nested", "sorted",
    "fixed", "masked", "padded", "packed", "tied", "unused", "normalized", "quantized",
    "flattened", "closed", "detached", "gathered", "seeded", "typed", "pooled", "tilted",
    "squared", "pretrained",
}
NO_BEGINNING = {
    "the", "what", "of", "and", "whether", "how", "where", "which", "who", "that", "in", "as",
    "by", "for", "to", "its", "it", "if", "when", "while", "but", "or", "so", "this", "these",
    "those", "from", "with", "without", "at", "on", "nothing",
}
# fmt: on
NAMES_OF_THE_FIELD = {"held_out", "swapped"}  # a Split; public since the first version
PHRASES = (", expected", "in vain", " to be had", "what is more", "beside ")


def is_participle(word: str) -> bool:
    """Return whether a word says how something came instead of what it is or does."""
    ends = word.endswith("ed") and len(word) > 3 and word not in OF_THE_FIELD
    return word in PARTICIPLES or ends


def find_in_node(node: ast.AST) -> Iterator[str]:
    """Yield the words of one node that break a rule."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    name = node.name if is_function else ""
    if name not in NAMES_OF_THE_FIELD and is_participle(name.strip("_").split("_")[0].lower()):
        yield f"function {name}"
    is_test = name.startswith("test_")  # its docstring says what holds, in a sentence
    has_doc = is_function or isinstance(node, ast.ClassDef | ast.Module)
    if has_doc and not is_test:
        doc = ast.get_docstring(node) or ""
        if re.split(r"[\s,.:;`]", doc.strip())[0].lower() in NO_BEGINNING:
            yield f"docstring {doc.splitlines()[0]}"
    is_stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    name = node.id if is_stored else node.arg if isinstance(node, ast.arg) else ""
    if name.strip("_") in PARTICIPLES:
        yield f"variable {name}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from (f"phrase {phrase!r}" for phrase in PHRASES if phrase in node.value)


def find_unplain_words(text: str) -> list[str]:
    """Return what a module says against the rules, each with its line."""
    nodes = list(ast.walk(ast.parse(text)))
    return [
        f"{getattr(node, 'lineno', 1)}: {word}" for node in nodes for word in find_in_node(node)
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_words_are_plain(file: Path) -> None:
    assert find_unplain_words(file.read_text(encoding="utf8")) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("def told_of(x): ...", "1: function told_of"),
        ("def _mapped(x): ...", "1: function _mapped"),
        ('def f():\n    """What ranks hold."""', "1: docstring What ranks hold."),
        ('class A:\n    """The rows."""', "1: docstring The rows."),
        ("kept = 1", "1: variable kept"),
        ("def f(given): ...", "1: variable given"),
        ("raise ValueError('got 3, expected 4')", "1: phrase ', expected'"),
    ],
)
def test_each_mistake_is_found(text: str, word: str) -> None:  # the control
    assert find_unplain_words(text) == [word]


def test_words_of_the_field_are_allowed() -> None:
    text = 'def seed_generators(shared, is_kept):\n    """Return whether it draws."""\n'
    assert find_unplain_words(text) == []
