"""Models, losses and the recipe that come with the package."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

from anybatch import zoo
from anybatch.errors import LossError, ModelError
from anybatch.recipe.build import build
from anybatch.recipe.runs import create_run, load_recipe
from anybatch.recipe.train import train


def accuracy_of(split: int, folder: Path) -> float:
    """Held-out accuracy of the shipped recipe on one keyed split."""
    recipe, _, may_import = load_recipe("lenet-digits", [f"data.split={split}"], allow_code=False)
    assert may_import  # the recipe lies in no run
    with create_run(recipe, folder) as run:
        *_, last = train(build(recipe, allow_code=False), run)
    assert last.held_out is not None
    return last.held_out.metrics["accuracy"]


@pytest.mark.slow
def test_lenet_learns_the_digits_of_five_splits(
    tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    accuracies = [accuracy_of(split, tmp_path / str(split)) for split in range(5)]
    report = f"mean {mean(accuracies):.4f}, minimum {min(accuracies):.4f}"
    record_property("held_out_accuracy", report)
    print(f"held-out accuracy of LeNet over 5 splits: {report}")
    assert mean(accuracies) >= 0.98, report


@pytest.mark.parametrize(
    ("make", "inputs", "num_parameters"),
    [
        (lambda: zoo.softmax_regression(), (1, 8, 8), 64 * 10 + 10),
        (lambda: zoo.softmax_regression([3, 4], 5), (3, 4), 12 * 5 + 5),
        (lambda: zoo.mlp([784], [128]), (784,), 785 * 128 + 129 * 10),
        (lambda: zoo.mlp([6], [], 3), (6,), 7 * 3),
        # Caffe's: conv 20 of 5x5, conv 50 of 20x5x5, dense 800-500-10
        (lambda: zoo.lenet(28), (1, 28, 28), 520 + 25050 + 801 * 500 + 5010),
        (lambda: zoo.lenet(8), (1, 8, 8), 520 + 25050 + 201 * 500 + 5010),
    ],
)
def test_a_network_has_the_parameters_and_outputs_that_it_states(
    make: Callable[[], torch.nn.Module], inputs: tuple[int, ...], num_parameters: int
) -> None:
    model = make()
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    classes = list(model.parameters())[-1].numel()
    assert model(torch.zeros(3, *inputs)).shape == (3, classes)


def test_lenet_refuses_images_too_small_to_pool_twice() -> None:
    with pytest.raises(ModelError, match="cannot pool images of 3 pixels twice"):
        zoo.lenet(3)
    assert zoo.lenet(4)(torch.zeros(1, 1, 4, 4)).shape == (1, 10)


def test_cross_entropy_is_minus_log_p_of_each_example_with_its_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    result = zoo.cross_entropy(torch.nn.Identity(), (logits, torch.tensor([0, 1, 1])))
    log_p = logits - logits.exp().sum(1, keepdim=True).log()  # the definition
    expected = -log_p[range(3), [0, 1, 1]]
    torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=1e-6)  # float32
    assert result.metrics["accuracy"].tolist() == [1.0, 1.0, 0.0]
    mean_of_all = F.cross_entropy(logits, torch.tensor([0, 1, 1]))  # control: not averaged
    assert result.values.shape != mean_of_all.shape


def test_squared_error_sums_over_the_outputs_of_each_example() -> None:
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    targets = torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    assert zoo.squared_error(torch.nn.Identity(), (outputs, targets)).values.tolist() == [5.0, 4.0]


def test_losses_refuse_outputs_that_do_not_fit() -> None:
    with pytest.raises(LossError, match=r"got logits of shape \(3,\)\. Expected \(batch"):
        zoo.cross_entropy(torch.nn.Identity(), (torch.zeros(3), torch.zeros(3).long()))
    with pytest.raises(LossError, match=r"shape \(3, 2\) and targets of shape \(3,\)"):
        zoo.squared_error(torch.nn.Identity(), (torch.zeros(3, 2), torch.zeros(3)))
