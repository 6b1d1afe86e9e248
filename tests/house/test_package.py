"""Imports of the package: their cost, their directions, and all public names."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import anybatch

ROOT = Path(anybatch.__file__).parent
LEVELS = (  # of design.md, "Package": an arrow reads "is used by"
    {"compiled", "displays", "errors", "limits", "model_facts", "paths", "shipped"},
    {"_torch"},
    {
        "batch",
        "batch_errors",
        "example_losses",
        "extras",
        "penalties",
        "precision",
        "pytree",
        "randomness",
        "schedules",
    }
    | {"order", "reduction", "reductions"},
    {"objective", "layout", "distributed", "examples", "workers"},
    {"kernels"},
    {"ledger"},
    {"gradient"},
    {"optim"},
    {"runs"},
    {"training"},
    {"data", "zoo", "recipe"},
    {"audit", "advice", "report", "questions", "integrations"},
    {"cli", "__main__"},
)
COMMANDS = (
    *("demo", "new", "recipes", "train", "resume", "runs", "show", "evaluate", "predict"),
    *("explain", "examples", "compare", "scale", "advise", "profile", "export", "verify"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
ALLOWED = {
    "audit": {"audit", "batch", "displays", "errors", "pytree"},
    "reference": {"reference"},
}  # narrower still
ALSO = {"questions": {"reference"}}  # beside the levels


def in_a_new_process(code: str) -> str:
    """Return what a program prints, in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def modules_after(code: str) -> set[str]:
    """Everything that is imported once a program has run."""
    return set(in_a_new_process(f"{code}\nimport sys\nprint(*sys.modules)").split())


def roots(modules: set[str]) -> set[str]:
    """Their top-level packages, the standard library's left out."""
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names


def test_importing_anybatch_and_using_every_name_loads_torch_and_numpy_alone() -> None:
    every_name = "import anybatch\nfor name in anybatch.__all__: getattr(anybatch, name)"
    result = modules_after(every_name)
    assert {"torch", "numpy", "anybatch"} <= roots(result)
    forbidden = {"pydantic", "typer", "rich", "click", "safetensors", "sklearn", "tomli_w"}
    forbidden |= {"jinja2", "plotly"}
    assert not roots(result) & forbidden
    theirs = sorted(name for name in result if name.startswith(("torch.", "numpy.")))
    alone = modules_after(f"from importlib import import_module as i\nfor n in {theirs}: i(n)")
    assert roots(result) - roots(alone) == {"anybatch"}


def test_the_listing_sees_a_package_too_many() -> None:  # the control
    assert "tomli_w" in roots(modules_after("import anybatch, tomli_w"))


def test_importing_anybatch_alone_loads_not_even_torch() -> None:
    code = "import sys, anybatch; print('torch' in sys.modules)"
    assert in_a_new_process(code) == "False\n"


def processor_seconds() -> float:
    """Return the processor time of the processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_takes_under_three_tenths_of_a_second_without_torch_or_pydantic() -> None:
    code = (
        "import sys\nfrom anybatch.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'sklearn', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    seconds, bare = [], []
    for _ in range(20):
        beginning = processor_seconds()
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(processor_seconds() - beginning)
        assert ended.stderr == "[]\n"
        beginning = processor_seconds()
        in_a_new_process("import typer.rich_utils")  # what a slow or busy machine takes for it
        bare.append(processor_seconds() - beginning)
        if min(seconds) < 0.3:
            break
    assert min(seconds) < max(0.3, 1.4 * min(bare))
    for word in (*COMMANDS, "130"):
        assert word in ended.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    from command_line import run_command

    assert "--json" in run_command(command, "--help").out


def test_every_public_name_is_there_and_its_stub_says_the_same() -> None:
    for name in anybatch.__all__:
        assert getattr(anybatch, name) is not None
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    named = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(filter(None, named)) == anybatch.__all__
    for name, home in named.items():
        assert home == f"anybatch.{anybatch._module_of[str(name)]}.{name}"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'anybatch' has no attribute 'batch_gradeint'"):
        _ = anybatch.batch_gradeint


def imports_of(text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, in functions and elsewhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(file: Path) -> str:
    """Return the part of the package that a file belongs to, such as "training"."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def violations(file: Path, text: str) -> list[str]:
    """Imports of a module that go up the list, or further down than its arrows say."""
    part, result = part_of(file), []
    for line, name in imports_of(text):
        home, _, rest = name.partition(".")
        used = rest.partition(".")[0]
        if home != "anybatch" or used == "__version__":
            continue
        below = {name for name, level in LEVEL_OF.items() if level <= LEVEL_OF.get(part, -1)}
        if rest and used not in ALLOWED.get(part, below | ALSO.get(part, set())):
            result.append(f"{file}:{line}: {part} imports {used}")
    return result


def sources() -> dict[Path, str]:
    """Return the text of every module of the package."""
    files = (file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py")
    return {file: file.read_text() for file in files}


def test_imports_go_down_the_list_of_the_design_only() -> None:
    texts = sources()
    assert {part_of(file) for file in texts} <= {*LEVEL_OF, "reference"}
    assert [row for file, text in texts.items() for row in violations(file, text)] == []


def test_a_forbidden_import_is_caught_inside_a_function_too() -> None:  # the control
    text = "def late():\n    from anybatch.training import steps\n    return steps\n"
    file = ROOT / "gradient" / "compute.py"
    assert violations(file, text) == [f"{file}:2: gradient imports training"]
    assert violations(ROOT / "audit" / "x.py", "import anybatch.layout") != []
    assert violations(ROOT / "reference" / "x.py", "from anybatch import errors") != []
    assert violations(ROOT / "cli" / "x.py", text) == []


def test_no_two_modules_import_each_other() -> None:
    modules = {
        ".".join(("anybatch", *file.relative_to(ROOT).with_suffix("").parts)): text
        for file, text in sources().items()
    }
    modules = {name.removesuffix(".__init__"): text for name, text in modules.items()}
    uses = {
        name: {home for _, full in imports_of(text) if (home := _home(full, modules)) != name}
        for name, text in modules.items()
    }
    assert cycle(uses) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None  # control


def _home(full: str, modules: Iterable[str]) -> str:
    """Return the module that a full name comes from: the longest that begins it."""
    return max((name for name in modules if f"{full}.".startswith(f"{name}.")), key=len, default="")


def cycle(uses: dict[str, set[str]]) -> str | None:
    """A module that is left when those that use nothing are taken away again and again."""
    left = dict(uses)
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    return next(iter(left), None)


def test_distributed_alone_imports_torch_distributed() -> None:
    users = {
        part_of(file)
        for file, text in sources().items()
        for _, name in imports_of(text)
        if f"{name}.".startswith("torch.distributed.")
    }
    assert users == {"distributed"}
