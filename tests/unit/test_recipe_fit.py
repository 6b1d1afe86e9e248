"""Messages for parts that do not fit: missing channels, unscaled images, names of other tools.

Oracle: NumPy's shapes and values of the data that the test itself writes.
"""

from pathlib import Path

import numpy as np
import pytest

from command_line import anybatch, refuse, run_command, write_recipe


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(inputs: np.ndarray, model: dict[str, object], lr: float = 0.001) -> Path:
    """A recipe for some inputs and two classes."""
    np.savez("data.npz", inputs=inputs, targets=np.arange(len(inputs)) % 2)
    return write_recipe(
        Path(),
        data={"name": "npz", "args": {"path": "data.npz"}},
        model=model,
        batch={"size": 8},
        optimizer={"lr": lr},
    )


LENET: dict[str, object] = {"name": "lenet", "args": {"image": 8, "classes": 2}}
NETS = """
from torch import nn

def text():
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.LazyLinear(2))

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3)))
"""


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (LENET, (8, 8), ["(1, height, width): the channels are missing", "inputs[:, None]"]),
        (LENET, (3, 8, 8), ["It takes examples of shape (1, height, width), the channels first."]),
        (
            {"name": "softmax_regression", "args": {"inputs": [9], "classes": 2}},
            (8,),
            ["(Linear) was given 2 examples in shape (2, 8). It takes 9 numbers"],
        ),
    ],
)
def test_the_layer_is_named_with_what_came_and_what_it_takes(
    model: dict[str, object], shape: tuple[int, ...], words: list[str]
) -> None:
    message = refuse("train", recipe(np.zeros((30, *shape)), model))
    assert str(shape) in message
    assert all(word in message for word in words), message


def test_a_layer_of_ones_own_model_is_named_beside_the_line_of_its_code() -> None:
    Path("nets.py").write_text(NETS)
    message = refuse("train", recipe(np.zeros((30, 8, 8)), {"name": "nets:Own"}))
    assert "in your own code at" in message
    assert "Layer first (Conv2d) was given 2 examples in shape (2, 8, 8)" in message
    assert "the channels are missing" in message
    good = recipe(np.eye(30, 64).reshape(30, 1, 8, 8), {"name": "nets:Own"})
    run_command("train", good)  # the control: with the channel it trains


def test_images_that_reach_255_are_told_before_and_after_a_divergence() -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (60, 1, 8, 8))
    images[0, 0, 0, :2] = 0, 255
    ended = anybatch("train", recipe(images, LENET, lr=1e-7))
    assert ended.code == 0
    assert "whole numbers from 0 to 255" in ended.err
    diverged = anybatch("train", recipe(images, LENET, lr=10.0))
    assert diverged.code == 2
    assert "It may be the data: the inputs are whole numbers from 0 to 255" in diverged.err
    for others in (images / 255, images - 1, images / 2):  # the controls
        assert "255" not in anybatch("train", recipe(others, LENET, lr=1e-7)).err


def test_a_run_that_failed_says_what_it_has_left() -> None:
    images = np.random.default_rng(0).normal(size=(60, 1, 8, 8)) * 100
    message = refuse("train", recipe(images, LENET, lr=1e5), "--out", "run")
    assert "The learning rate was 100000" in message
    assert "run is kept with its records, but has no checkpoint yet." in message
    assert Path("run").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: no such key; did you mean 'lr'?"),
        ("run.lr=1", "run.lr: no such key; did you mean 'optimizer.lr'?"),
        ("run.batch_size=1", "run.batch_size: no such key; did you mean 'batch.size'?"),
        ("batch.batch_size=1", "batch.batch_size: no such key; did you mean 'size'?"),
        ("optimizer.weight_decay=1", "did you mean 'objective.penalty'?"),
        ("optimizer.momentum=1", "is written args = { momentum = ... }"),
        ("data.name=mnist", "no data set 'mnist'; did you mean 'fashion_mnist'?"),
        ("data.name=Digits", "no data set 'Digits'; did you mean 'digits'?"),
        ("data.name=cifar", "no data set 'cifar'; did you mean 'cifar10'?"),
        ("model.name=soft-max", "no model 'soft-max'; did you mean 'softmax_regression'?"),
    ],
)
def test_names_of_other_tools_are_led_to_ours(change: str, words: str) -> None:
    assert words in refuse("train", "lenet-digits", "--set", change)


@pytest.mark.parametrize(
    ("typed", "intent"),
    [("lenet", "lenet-digits"), ("LeNet", "lenet-digits"), ("gpt", "gpt-pydoc"), ("goyl", "goyal")],
)
def test_the_nearest_recipe_is_offered(typed: str, intent: str) -> None:
    assert f"did you mean {intent!r}?" in refuse("train", typed)
