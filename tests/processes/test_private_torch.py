"""Private names of torch: all in `_torch.py`, and each can go without a wrong number.

Each name is taken away in a process of its own. Then a plain gradient and a step of `ab.steps` are
those of torch with all its names, or one error says which versions of torch work.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from anybatch._torch import PRIVATE_NAMES

SOURCES = Path(__file__).parents[2] / "src" / "anybatch"
PRIVATE = re.compile(
    r"torch(\.\w+)*\._[a-zA-Z]|from torch[\w.]*\._|from torch[\w.]* import (.*, )?_[a-zA-Z]"
)
NOT_IMPORTED = ("torch._dynamo", "torch._tensor")  # names of modules, compared as text
PROGRAM = """
import importlib, sys
import torch

class Without:
    def __init__(self, namespace, name):
        self.namespace, self.name = namespace, name
    def __getattr__(self, other):
        if other == self.name:
            raise AttributeError(other)
        return getattr(self.namespace, other)

def find_owner(path):
    try:
        return importlib.import_module(path)
    except ImportError:
        above, _, name = path.rpartition(".")
        return getattr(find_owner(above), name)

missing = sys.argv[1:]
try:
    for path in missing:  # torch uses it too, so it is away only while anybatch looks for it
        owner, _, name = path.rpartition(".")
        parent = find_owner(owner)
        if "torch.ops" in path:
            library = owner.rpartition(".")[2]
            setattr(torch.ops, library, Without(parent, name))
        else:
            value = getattr(parent, name)
            delattr(parent, name)
    try:
        import anybatch._torch
    finally:
        for path in missing:
            if "torch.ops" in path:
                setattr(torch.ops, library, parent)
            else:
                setattr(parent, name, value)

    import anybatch as ab
    import torch.nn.functional as F

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout(0.0), torch.nn.Linear(5, 3))
    data = torch.randn(8, 4), torch.arange(8) % 3
    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    plain = torch.autograd.grad(losses(model, data).mean(), list(model.parameters()))
    observe = ab.Observe(norms=True)
    gradient = ab.batch_gradient(
        model, ab.Objective(losses), data, clip=ab.ClipNorm(1e9), observe=observe
    )
    assert all(torch.allclose(g, p.grad) for g, p in zip(plain, model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = ab.Order(8, batch_size=4, seed=0)
    steps = ab.steps(model, ab.Objective(losses), optimizer, data, order=order, epochs=1)
    print("works", len(list(steps)))
except Exception as error:
    print(type(error).__name__, error)
"""


def run_without(*names: str) -> str:
    """Return what a small program prints, with names of torch taken away from it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *names], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def private_uses(text: str) -> list[str]:
    """Return the lines of a module that name something private of torch."""
    return [
        line
        for line in text.splitlines()
        if PRIVATE.search(line) and not any(f'"{name}' in line for name in NOT_IMPORTED)
    ]


def test_private_names_are_used_in_one_module_alone() -> None:
    others = [file for file in SOURCES.rglob("*.py") if file.name != "_torch.py"]
    assert len(others) > 100
    assert {str(file): uses for file in others if (uses := private_uses(file.read_text()))} == {}


@pytest.mark.parametrize(
    "line", ["torch._foreach_norm(x)", "from torch._C import x", "from torch.nn import _Loss"]
)
def test_the_check_finds_a_private_name(line: str) -> None:  # the control
    assert private_uses(line) == [line]


def test_every_module_has_its_names_before_any_is_taken_away() -> None:
    assert len(PRIVATE_NAMES) > 20
    assert run_without() == "works 2"


@pytest.mark.parametrize("name", sorted(PRIVATE_NAMES))
def test_without_a_name_the_result_is_right_or_one_error_says_which_torch_works(name: str) -> None:
    output = run_without(name)
    if PRIVATE_NAMES[name]:
        assert output == "works 2"
    else:
        assert output.startswith(("works 2", "VersionError torch "))
        assert "works 2" in output or "torch>=2.13,<3" in output
