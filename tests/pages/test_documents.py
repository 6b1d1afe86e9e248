"""Each document runs as it is printed: its Python, its commands, and the output that it shows."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from documents import compare_output, read_blocks, run_document

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide.md"
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
OTHERS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {GUIDE}),
    *sorted((ROOT / "docs" / "integrations").glob("*.md")),
]
COMMANDS = r"(anybatch|python|torchrun|make|pip|tensorboard|mlflow|wandb)"


def copy_repository(folder: Path) -> Path:
    """Copy what a reader's commands find in the repository's folder."""
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory):
    """Run the tour of the guide once; its pages go on in the same folder, with its run."""
    folder = copy_repository(tmp_path_factory.mktemp("guide"))
    return folder, run_document(GUIDE, folder)


def count_blocks(document: Path) -> int:
    """Count the blocks that must run, by their first lines."""
    text = document.read_text()
    kinds = [f"\n```{language}\n" for language in ("python", "sh", "toml")]
    return sum(map(text.count, kinds)) - text.count("\n<!-- not run: ")


def test_the_tour_of_the_guide_runs(guide_folder):
    folder, count = guide_folder
    assert count == count_blocks(GUIDE)
    assert (folder / "runs").is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_of_the_guide_runs(page, guide_folder):
    folder, _ = guide_folder
    assert run_document(page, folder) == count_blocks(page)


@pytest.mark.parametrize("document", OTHERS, ids=lambda path: path.stem)
def test_a_document_runs(document, tmp_path):
    if document.stem in ("ray", "torchtitan") and find_spec(document.stem) is None:
        pytest.skip(f"{document.stem} is missing: make test-{document.stem}")
    assert run_document(document, copy_repository(tmp_path)) == count_blocks(document)


def test_at_most_three_blocks_are_not_run_and_each_says_why():
    reasons = [
        f"{document.name}, line {block.line}: {block.reason}"
        for document in [GUIDE, *PAGES, *OTHERS]
        for block in read_blocks(document.read_text())
        if block.reason is not None
    ]
    assert len(reasons) <= 3, reasons


@pytest.mark.parametrize("document", [GUIDE, *PAGES, *OTHERS], ids=lambda path: path.stem)
def test_no_command_hides_in_a_block_that_is_not_run(document):
    markdown = document.read_text()
    blocks = read_blocks(markdown)
    texts = [block.output or "" for block in blocks]
    texts += [block.text for block in blocks if block.language in {"", "text"}]
    indented = re.findall(rf"^ {{4,}}\$? ?{COMMANDS} ", outside_blocks(markdown), re.MULTILINE)
    assert indented == []
    assert not any(re.search(rf"^\$? ?{COMMANDS} ", text, re.MULTILINE) for text in texts)


def outside_blocks(markdown: str) -> str:
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)


GOOD = """\
```python
value = 2 / 3
print(f"{value:.3f}", 7)
```

```text
0.667 7
```

```sh
pip install nothing-of-that-name
echo one > file
```

```python
from pathlib import Path

print(Path("file").read_text(), value)
```

```text
one ...
```

```toml
# mine.toml
key = 1
```

```sh
cat mine.toml | grep key
make demo
```

```
key = 1
...
```
"""


def run_text(text: str, folder: Path) -> int:
    path = folder / "document.md"
    path.write_text(text)
    return run_document(path, folder)


def test_blocks_share_names_and_a_folder(tmp_path):
    assert run_text(GOOD, copy_repository(tmp_path)) == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.667 7", "0.665 7", r"line 2: the document shows 0.665, and it prints 0.667"),
        ("0.667 7", "0.667 8", r"the document shows 8, and it prints 7"),
        ("0.667 7", "0.667 seven", r"line 2: it does not print the text"),
        ("```text\none ...\n```\n", "", r"line 16 does not show:\n  one"),
        ("cat mine.toml", "cat yours.toml", r"line 31 ends with exit code 1:\n.*No such file"),
        ("make demo", "make nothing", r"line 31 ends with exit code 2:\n.*No rule to make target"),
        ("# mine.toml\n", "", r"line 26: the first line names no file"),
        ("echo one", "false\necho one", r"line 11 ends with exit code 1"),
        ("```sh\ncat", "```bash\ncat", r"line 31: a block of 'bash'"),
    ],
)
def test_a_document_that_is_wrong_fails(old, new, message, tmp_path):
    assert old in GOOD
    with pytest.raises(AssertionError, match=message):
        run_text(GOOD.replace(old, new), copy_repository(tmp_path))


def test_an_error_in_a_block_of_python_names_the_line_of_the_document(tmp_path):
    wrong = GOOD.replace("value = 2 / 3", "value = 2 / 0")
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        run_text(wrong, copy_repository(tmp_path))
    assert (caught.traceback[-1].path.name, caught.traceback[-1].lineno) == ("document.md", 1)


def test_a_block_with_a_reason_is_not_run(tmp_path):
    assert run_text("<!-- not run: no network -->\n```sh\nfalse\n```\n", tmp_path) == 0
    with pytest.raises(AssertionError, match="exit code 1"):
        run_text("not run: no network\n```sh\nfalse\n```\n", tmp_path)


@pytest.mark.parametrize(
    ("expected", "printed", "agree"),
    [
        ("loss 0.312", "loss 0.313", True),
        ("loss 0.312", "loss 0.314", False),
        ("4e-16", "3e-16", True),
        ("4e-16", "4e-15", False),
        ("tensor([1., 2.5])", "tensor([1.,   2.6])", True),
        ("step 12", "step 13", False),
        ("conv1 1.0", "conv2 1.0", False),
        ("a ... 5", "a 1 2 5", True),
        ("a ... 5", "a 1 2 15", False),
        ("", "text", False),
    ],
)
def test_numbers_agree_to_their_last_digit(expected, printed, agree):
    assert (compare_output(expected, printed) is None) == agree
