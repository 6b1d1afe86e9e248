"""Five questions, asked anew; the figures are those that the questions came with.

Oracle: pencil and paper for the first and the last; for the others the identities themselves,
Sum = B Mean and one batch = the sum of its examples, within what float64 rounding leaves.
"""

import re
import runpy
import time
from pathlib import Path

import pytest
import torch

from anybatch import questions

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def answers() -> list[questions.Answer]:
    questions.ask()  # imports and first calls
    return questions.ask()


def test_all_five_are_answered_in_under_five_seconds() -> None:
    beginning = time.perf_counter()
    assert len(questions.ask()) == 5
    assert time.perf_counter() - beginning < 5


def test_one_update_comes_out_of_gradients_and_not_of_losses(
    answers: list[questions.Answer],
) -> None:
    figures = answers[0].figures
    assert figures["losses"] == pytest.approx([2, -2], abs=1e-12)
    assert figures["mean_loss"] == pytest.approx(0, abs=1e-12)
    assert figures["gradient"] == pytest.approx([1.35, 0.15, 0, -0.2, -0.8], abs=1e-12)
    assert figures["weights"] == pytest.approx([-0.135, -0.015, 0, 3.22, -0.72], abs=1e-12)
    text = "\n".join(answers[0].lines)
    for output in ("loss +2", "loss -2", "(1.35, 0.15, 0, -0.2, -0.8)", "(-0.135, -0.015, 0, 3.22"):
        assert output in text


def test_the_sum_is_the_mean_only_with_the_penalty_converted(
    answers: list[questions.Answer],
) -> None:
    figures = answers[1].figures
    assert figures["distance_with_conversion"] < 1e-12
    assert figures["distance_without"] > 1e-3


def test_doubling_a_batch_doubles_the_gradient_of_the_sum_alone(
    answers: list[questions.Answer],
) -> None:
    ratios = answers[2].figures["norm_ratio"]
    assert ratios == pytest.approx({"mean": 1, "sum": 2}, rel=1e-12)


def test_the_loop_and_the_batch_agree_and_the_batch_is_faster(
    answers: list[questions.Answer],
) -> None:
    figures = answers[3].figures
    assert figures["distance"] < 1e-10
    assert figures["speed_ratio"] > 1


def test_each_example_routes_its_gradient_to_its_own_winner(
    answers: list[questions.Answer],
) -> None:
    figures = answers[4].figures
    assert figures["winners"] == [1, 2, 0]
    assert figures["gradients"] == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]


def test_asking_leaves_threads_and_generators_as_they_were() -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    questions.ask()
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_every_answer_fits_a_terminal_and_starts_with_the_answer(
    answers: list[questions.Answer],
) -> None:
    for answer in answers:
        assert max(map(len, answer.lines)) <= 74
    assert [answer.answer.split(".")[0].split(",")[0] for answer in answers] == [
        "No",
        "Yes",
        "The mean",
        "1",
        "Each example sends its gradient to its own winner",
    ]


def test_every_answer_names_a_script_that_is_there(answers: list[questions.Answer]) -> None:
    for answer in answers:
        command, script = answer.look.split()
        assert command == "python"
        assert (EXAMPLES.parent / script).is_file()


@pytest.mark.parametrize(
    ("script", "output"),
    [
        ("one_update", [r"their mean +1.350 +0.150 +0.000 +-0.200 +-0.800", r"after +-0.135"]),
        ("sum_or_mean", [r"penalty times B +\d\.\de-1[4-7]", r"same penalty +1\.1e-01", "2.000"]),
        ("step_by_step", [r"gradient \de-1[4-7] away", r"loss 2\.\d+ -> 2\.\d+"]),
    ],
)
def test_the_scripts_that_look_further_show_the_figures(
    script: str, output: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern in output:
        assert re.search(pattern, printed), f"{pattern} in\n{printed}"
    assert len(printed.splitlines()) < 20
