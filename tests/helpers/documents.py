"""Run a Markdown document as it is printed, and compare what it prints with what it shows.

    python    runs in this process; all blocks of a document share one namespace
    sh        runs in a fresh shell, with the environment's bin directory first in PATH
    text      is the output of the block before it
    # name    in the first line of any block: the block is saved as that file, and not run

A comment `<!-- not run: reason -->` before a block leaves it out.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

LANGUAGES = {"python", "sh", "toml", "text"}
TEXT_BLOCKS = {"text", ""}
DRAWINGS = {"mermaid"}
NUMBER = re.compile(r"(?<![\w.])-?\d+\.?\d*(?:e[+-]?\d+)?(?!\w)")
FILE_NAME = re.compile(r"# ([\w/-]+\.\w+)\n")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*$")
INSTALL = re.compile(r"\s*(git clone|cd anybatch|pip install|python3? -m venv|source|\.) ?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int  # of its first line of text, from 1
    output: str | None  # the block of text that follows
    reason: str | None  # why it is not run

    @property
    def file_name(self) -> str | None:
        """Name of the file that the block is."""
        match = FILE_NAME.match(self.text)
        return match and match[1]


def read_blocks(markdown: str) -> list[Block]:
    """Read the fenced blocks of a document; a block of text becomes the output of the one before.

    Raises:
        AssertionError: the language of a block is not known.
    """
    blocks: list[Block] = []
    end = 0
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE):
        language, text = match[1], match[2]
        between = markdown[end : match.start()]
        line = markdown.count("\n", 0, match.start(2)) + 1
        end = match.end()
        if language in DRAWINGS:
            continue
        assert language in LANGUAGES | TEXT_BLOCKS, f"line {line}: a block of {language!r}"
        if language in TEXT_BLOCKS and blocks and not between.strip():
            last = blocks.pop()
            blocks.append(Block(last.language, last.text, last.line, text, last.reason))
        else:
            reason = NOT_RUN.search(between)
            blocks.append(Block(language, text, line, None, reason and reason[1]))
    return blocks


def run_document(path: Path, folder: Path) -> int:
    """Run every block of a document in a folder, in order.

    Returns:
        The number of blocks that were run or saved.

    Raises:
        AssertionError: a block fails, prints something else than the document shows, or prints
            something that the document does not show.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = [b for b in read_blocks(path.read_text()) if b.language not in TEXT_BLOCKS]
    blocks = [b for b in blocks if b.reason is None]
    for block in blocks:
        if block.file_name is not None:
            (folder / block.file_name).write_text(block.text)
            continue
        place = f"{path.name}, line {block.line}"
        assert block.language != "toml", f"{place}: the first line names no file"
        if block.language == "python":
            printed = run_python(block, path, folder, names)
            assert block.output is not None or not printed, f"{place} does not show:\n{printed}"
        else:
            printed = run_shell(block, place, folder)
        if block.output is not None:
            difference = compare_output(block.output, printed)
            assert difference is None, f"{place}: {difference}\nIt printed:\n{printed}"
    return len(blocks)


def run_python(block: Block, path: Path, folder: Path, names: dict[str, Any]) -> str:
    """Run a block of Python in a namespace, and return what it prints."""
    text = "\n" * (block.line - 1) + block.text  # tracebacks name the line of the document
    printed = StringIO()
    with redirect_stdout(printed), chdir(folder):
        exec(compile(text, str(path), "exec"), names)
    return printed.getvalue()


def run_shell(block: Block, place: str, folder: Path) -> str:
    """Run a block of shell commands but for lines that install; make shows what it would do."""
    lines = [line for line in block.text.splitlines() if not INSTALL.match(line)]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MAKEFLAGS": "n",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, (
        f"{place} ends with exit code {process.returncode}:\n{process.stderr}{process.stdout}"
    )
    return process.stdout


def compare_output(expected: str, printed: str) -> str | None:
    """Compare an output with what a document shows; None if they agree.

    White space is one space, `...` is any text, and a number with a point or an exponent may
    differ by one in its last digit.
    """
    pattern = "".join(_patterns(" ".join(expected.split())))
    match = re.fullmatch(pattern, " ".join(printed.split()), re.DOTALL)
    if match is None:
        return "it does not print the text that the document shows."
    numbers = NUMBER.findall(expected)
    for number, actual in zip(numbers, match.groups(), strict=True):
        if abs(float(number) - float(actual)) > 1.01 * last_digit(number):
            return f"the document shows {number}, and it prints {actual}."
    return None


def last_digit(number: str) -> float:
    """Value of one in the last digit of a decimal number; 0 for a whole number."""
    mantissa, _, exponent = number.partition("e")
    if "." not in mantissa and not exponent:
        return 0.0
    return float(10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])))


def _patterns(expected: str) -> Iterator[str]:
    """Yield a pattern for each piece of a text: the numbers, and what lies between."""
    end = 0
    for match in NUMBER.finditer(expected):
        yield _escape(expected[end : match.start()])
        yield f"({NUMBER.pattern})"
        end = match.end()
    yield _escape(expected[end:])


def _escape(text: str) -> str:
    return re.escape(text).replace(r"\.\.\.", ".*?")
