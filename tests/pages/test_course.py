"""Course: each script and notebook runs, agrees with figures by hand, and is up to date.

Oracles: school arithmetic, and the network of `network_by_hand.py`, which share no code with the
engine or with `anybatch.reference`. A chapter takes at most 20 seconds of processor time.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from documents import compare_output
from network_by_hand import backward, errors_of, flat

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "examples" / "course"
PICTURES = ROOT / "docs" / "course"
SCRIPTS = sorted(COURSE.glob("[0-9]_*.py"))
SECONDS = 20


def measure_child_seconds() -> float:
    """Return the processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_script(script: Path, folder: Path) -> str:
    beginning = measure_child_seconds()
    command = [sys.executable, "-W", "error", str(script)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert measure_child_seconds() - beginning < SECONDS
    return ended.stdout


def read_notebook(script: Path) -> dict:
    return json.loads(script.with_suffix(".ipynb").read_text(encoding="utf8"))


def run_notebook(script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Execute the code cells in one namespace, and return it."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(script.parent))
    names: dict = {"__name__": "__main__"}
    for cell in read_notebook(script)["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), script.with_suffix(".ipynb").name, "exec"), names)
    return names


def find_wrong_answers(printed: str) -> list[str]:
    """Return the comparisons that a chapter prints as False."""
    return re.findall(r"^.*\bFalse\b.*$", printed, re.MULTILINE)


def test_there_is_a_chapter_for_each_of_the_five_questions():
    from anybatch.questions import ask

    heads = [script.read_text().split("\n")[1] for script in SCRIPTS]
    questions = [answer.question for answer in ask()]
    questions[0] = "How does one update come out of many examples?"
    assert heads == [f"# # {number}. {text}" for number, text in enumerate(questions, start=1)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_in_time_and_draws_its_picture(script, tmp_path):
    printed = run_script(script, tmp_path)
    assert find_wrong_answers(printed) == []
    assert "True" in printed or "by hand 2.000" in printed
    (picture,) = tmp_path.iterdir()
    assert printed.endswith(f"picture: {picture.name}\n")
    sample, output = (path.read_text() for path in (picture, PICTURES / picture.name))
    assert compare_output(place_words(output), place_words(sample)) is None


def place_words(svg: str) -> str:
    """Return a picture with its numbers apart, in whole pixels, so that rounding does not count."""
    numbers = re.sub(r"\d+\.\d+", lambda result: f" {float(result[0]):.0f} ", svg)
    return re.sub(r"([^\d\s.-])", r" \1 ", numbers)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_that_of_its_script_and_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(COURSE))
    from make_notebooks import make_notebook

    text = script.read_text(encoding="utf8")
    assert script.with_suffix(".ipynb").read_text(encoding="utf8") == make_notebook(text)
    run_notebook(script, tmp_path, monkeypatch)
    assert find_wrong_answers(capsys.readouterr().out) == []
    last = read_notebook(script)["cells"][-1]["source"][-1]
    assert ".save(" in last  # its value is the picture, which a notebook shows


def test_a_changed_script_and_a_wrong_answer_are_noticed(tmp_path, monkeypatch):  # the control
    monkeypatch.syspath_prepend(str(COURSE))
    from make_notebooks import make_notebook, read_cells

    assert read_cells("# %% [markdown]\n# # Head\n#\n# text\n\n# %%\nx = 1\n") == [
        ("markdown", "# Head\n\ntext"),
        ("code", "x = 1"),
    ]
    text = SCRIPTS[0].read_text()
    changed = text.replace("rate = 0.1", "rate = 0.2").replace("+ 0.0}", "+ 0.1}")
    assert make_notebook(changed) != make_notebook(text)
    folder = tmp_path / "copy"
    shutil.copytree(COURSE, folder)
    wrong = folder / SCRIPTS[0].name
    wrong.write_text(text.replace("after = start - rate * mean", "after = start - 2 * rate * mean"))
    assert find_wrong_answers(run_script(wrong, tmp_path)) == ["the same weights: False"]
    sample = (PICTURES / "1_one_update.svg").read_text()
    (result,) = set(re.findall(r'height="(93\.8)"', sample))  # the bar of 1.5
    moved = sample.replace(result, "96.8")
    assert compare_output(place_words(sample), place_words(moved)) is not None


@pytest.fixture(scope="module")
def pooling_by_hand():
    """Right and split gradients of chapter 5's weights before the pooling, and all weights."""
    images, classes = load_digits(return_X_y=True)
    x, y = images[:60].reshape(-1, 8, 8) / 16, classes[:60]
    torch.manual_seed(0)
    convolve, dense = torch.nn.Conv2d(1, 6, 3), torch.nn.Linear(54, 10)
    tensors = [convolve.weight[:, 0], convolve.bias, dense.weight, dense.bias]
    weights = [tensor.detach().double().numpy() for tensor in tensors]
    errors = errors_of(weights, x, y) / 60
    return flat(backward(weights, x, errors)), flat(backward(weights, x, errors, True))


def test_the_distance_of_chapter_5_is_that_of_a_network_by_hand(pooling_by_hand, tmp_path):
    right, wrong = (gradient[:60] for gradient in pooling_by_hand)
    distance = np.linalg.norm(wrong - right) / np.linalg.norm(right)
    printed = run_script(SCRIPTS[4], tmp_path)
    assert f"split: {distance:.2f} away" in printed
    assert distance > 0.1  # the control: the wrong idea is not the right one


def test_the_rates_of_chapter_3_are_those_of_a_search_by_hand():
    """Search the rates in NumPy, all examples of a batch at once, from the page's own draws."""
    images, classes = load_digits(return_X_y=True)
    x, wanted = images[:1024] / 16, np.eye(10)[classes[:1024]]

    def errors(weights, ids):
        outputs = np.exp(x[ids] @ weights)
        return outputs / outputs.sum(1, keepdims=True) - wanted[ids]

    def final_loss(rate, size):
        generator, weights = torch.Generator().manual_seed(0), np.zeros((64, 10))
        epochs = [torch.randperm(1024, generator=generator) for _ in range(size // 16 + 1)]
        for ids in torch.cat(epochs).numpy()[: 64 * size].reshape(64, size):
            weights -= rate * x[ids].T @ errors(weights, ids) / size
        outputs = x @ weights
        return (np.log(np.exp(outputs).sum(1)) - outputs[wanted > 0]).mean()

    page = (ROOT / "docs" / "course.md").read_text()
    printed = re.findall(r"B = +(\d+): best rate +([\d.]+) for the mean", page)
    assert [size for size, _ in printed] == ["1", "4", "16", "64", "256"]
    for size, rate in printed[::2]:
        near = [final_loss(float(rate) * factor, int(size)) for factor in (0.5, 1, 2)]
        assert near[1] == min(near)
