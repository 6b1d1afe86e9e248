"""docs/answers.md: each follow-up has its heading, and no number stands there unprinted.

`test_documents.py` runs the code of the page and compares what it prints. Here each number of the
prose is looked up in the code and the output of its section; a few are recomputed by hand, and some
of the printed ones too, by NumPy alone.
"""

import gzip
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from anybatch.questions import ideas
from documents import NUMBER, read_blocks

PAGE = Path(__file__).parents[2] / "docs" / "answers.md"
FASHION = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")
FENCE = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)
FOLLOW_UPS = {
    "1. How does one update": [
        "Is the gradient zero if the losses cancel?",
        "Is only the last example's gradient used?",
        "Where do gradients live?",
        "Does the framework keep an inner average of weights?",
        "How does one go back from a mean?",
        'Is "the gradient of the total error" the same as "the mean of the gradients"?',
        "Can errors of 2 and -2 cancel?",
        "Is it luck of the shuffle which update comes out?",
    ],
    "2. Is it usual": [
        "Why the mean?",
        "What changes with the rate?",
        "What changes with a penalty?",
        "What changes with clipping and epsilon?",
        "When does one minimise the maximum?",
        "A widely copied answer says W + lambda dL/dW. Is that right?",
    ],
    "3. Sum or mean": [
        "Which definition reproduces a paper?",
        "Why does the best rate grow with the batch size?",
    ],
    "4. How does the mini-batch method work": [
        "One example at a time, or all at once?",
        "How does one stop at a target?",
        "How does one notice that the rate is too large?",
        "How does one choose the batch size?",
        "Other starts, optimisers and penalties",
    ],
    "5. How does back-propagation": [
        "Must the gradient be split over all winners of the batch?",
        "May one average the error first and go back once?",
        "Does each example go back on its own only because of pooling?",
        "Are ties rare enough to forget?",
        "Who gets the gradient at a tie?",
    ],
    "Six wrong ideas": [],
}
# Numbers of the prose that no block of their section shows, and how each comes about.
BY_HAND = {
    "1.35": (1.5 + 1.2) / 2,
    "0.15": (-2.0 + 2.3) / 2,
    "1791": 1792 - 1,
    "-0.2": (0.4 - 0.8) / 2,
    "-0.8": (-0.9 - 0.7) / 2,
    "5": (3 + 7) / 2,
    "4": (5 - 3) ** 2,
    "-2": 5 - 7,
    "-4": 2 * (5 - 7),
    "32": 16 / 0.5,
    "8": 0.5 / 0.0625,
    "1": 1.0,
    "0.125": 1 / 8,
    "0.167": round(1 / 6, 3),
    "2.30": round(math.log(10), 2),
    "0.0000000000000001": 1e-16,
    "0.00002": 2 * 0.00001,
    "17": 1 + round(math.log2(128 * 512)),
    "512": 2**9,
    "128": 2**7,
    "0.75": 1.5 / 2,  # of the last test
    "0.01": ideas.PENALTY,
    "18": ideas.BATCH * 3 / 10,
    "15": ideas.BATCH / 4,
}
FASHION_NUMBERS = {"10000", "28", "45.9"}  # a test counts them where the data set is installed


def read_sections() -> dict[str, str]:
    """Return the text below each heading of the second level, the introduction first."""
    head, *rest = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {"": head} | {part.partition("\n")[0]: part.partition("\n")[2] for part in rest}


def find_section(title: str) -> str:
    (result,) = [text for name, text in read_sections().items() if title and name.startswith(title)]
    return result


def list_strange_numbers(prose: str, display: str) -> list[str]:
    """List the numbers of a prose that are neither shown nor computed by hand."""
    result = re.findall(r"-?\d[\d,]*\.?\d*", prose)
    numbers = {number.replace(",", "").rstrip(".") for number in result}
    truth = {abs(float(n)) for n in [*NUMBER.findall(display), *re.findall(r"\d+\.?\d*", display)]}
    truth |= {abs(float(number)) for number in BY_HAND}
    return sorted(n for n in numbers - FASHION_NUMBERS if abs(float(n)) not in truth)


@pytest.mark.parametrize("title", FOLLOW_UPS)
def test_each_section_begins_with_the_answer_and_has_its_follow_ups(title):
    section = find_section(title)
    answer = section.strip().split("\n\n")[0]
    assert re.fullmatch(r"\*\*[^*]+[.]\*\*", answer)
    assert answer.count(". ") == 0  # one sentence
    assert re.findall(r"^### (.+)$", section, re.MULTILINE) == FOLLOW_UPS[title]


@pytest.mark.parametrize("title", [title for title in FOLLOW_UPS if title[0].isdigit()])
def test_each_follow_up_is_answered_by_code_that_shows_its_output(title):
    silent = {"Is the gradient zero if the losses cancel?", "Why the mean?"}
    silent |= {"Which definition reproduces a paper?"}
    silent |= {"Does each example go back on its own only because of pooling?"}
    for part in re.split(r"^### ", find_section(title), flags=re.MULTILINE)[1:]:
        blocks = read_blocks(part)
        shows = any(block.output for block in blocks if block.language == "python")
        assert shows or part.partition("\n")[0] in silent


@pytest.mark.parametrize("title", FOLLOW_UPS)
def test_each_number_of_the_prose_is_shown_or_computed(title):
    section = find_section(title)
    prose = re.sub(r"^\|.*\|$", "", FENCE.sub("", section), flags=re.MULTILINE)  # no citations
    prose = re.sub(r"\]\([^)]*\)|question \d|questions? \d|\b1/B\b|float\d\d|version \d", "", prose)
    display = "".join(FENCE.findall(section)) + "".join(FENCE.findall(read_sections()[""]))
    assert list_strange_numbers(prose, display) == []


def test_a_number_from_nowhere_is_noticed():  # the control
    assert list_strange_numbers("It is 7.5, not 1.35 or 60.", "batch 60") == ["7.5"]


def test_the_numbers_by_hand_are_what_they_say():
    for text, value in BY_HAND.items():
        assert float(text) == pytest.approx(value, rel=1e-12)


def share_of_ties(images):
    """Share of the 2x2 windows whose maximum occurs more than once."""
    count, rows, columns = images.shape
    windows = images.reshape(count, rows // 2, 2, columns // 2, 2).swapaxes(2, 3)
    windows = np.sort(windows.reshape(-1, 4), axis=1)
    return (windows[:, -1] == windows[:, -2]).mean()


def test_ties_of_digits_are_counted_again():
    digits = load_digits().images
    framed = np.pad(digits, ((0, 0), (4, 4), (4, 4)))
    row = f"pixels          8x8 {share_of_ties(digits):6.1%}, framed {share_of_ties(framed):6.1%}"
    assert row in find_section("5. How")


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_ties_of_fashion_mnist_are_counted_again():
    pixels = np.frombuffer(gzip.decompress(FASHION.read_bytes())[16:], np.uint8)
    share = share_of_ties(pixels.reshape(-1, 28, 28))
    assert f"{100 * share:.1f} % tie" in find_section("5. How")


def test_the_mean_signal_of_a_softmax_is_as_far_away_by_hand():
    images, classes = load_digits(return_X_y=True)
    x, signals = images[:60] / 16, 0.1 - np.eye(10)[classes[:60]]  # zero weights: all equal
    right = np.mean([np.outer(a, s) for a, s in zip(x, signals, strict=True)], axis=0)
    once = np.outer(x.mean(0), signals.mean(0))
    distance = np.linalg.norm(once - right) / np.linalg.norm(right)
    cosine = (once * right).sum() / np.linalg.norm(once) / np.linalg.norm(right)
    display = f"zero weights, mean signal: distance {distance:.2f}, cosine {cosine:.2f}"
    assert display in find_section("5. How")


def train_softmax(x, wanted, rate, size, num_updates):
    """Train a table of weights from 0, and return its mean loss over all examples."""
    generator, weights = torch.Generator().manual_seed(0), np.zeros((64, 10))
    batches = [
        ids for _ in range(16) for ids in torch.randperm(1024, generator=generator).split(size)
    ]

    def probabilities(inputs):
        outputs = inputs @ weights
        shifted = np.exp(outputs - outputs.max(1, keepdims=True))
        return shifted / shifted.sum(1, keepdims=True)

    for ids in batches[:num_updates]:
        rows = ids.numpy()
        weights -= rate * x[rows].T @ (probabilities(x[rows]) - wanted[rows]) / size
    return -np.log((probabilities(x) * wanted).sum(1)).mean()


BEST = re.compile(
    r"^B = +(\d+), +(\d+) updates: best rate under Mean (\S+) *, under Sum (\S+) *, loss"
)


def test_the_best_rates_are_best_by_hand():
    """The rates twice and half as large are worse; rates under Sum are those under Mean over B."""
    images, classes = load_digits(return_X_y=True)
    x, wanted = images[:1024] / 16, np.eye(10)[classes[:1024]]
    rows = [m for line in find_section("3.").splitlines() if (m := BEST.match(line))]
    assert len(rows) == 10
    for row in rows:
        size, num_updates, rate = int(row[1]), int(row[2]), float(row[3])
        assert float(row[4]) == rate / size
        with np.errstate(divide="ignore"):  # a rate that is too large may leave a probability of 0
            half, best, twice = (
                train_softmax(x, wanted, r, size, num_updates) for r in (rate / 2, rate, 2 * rate)
            )
        assert best < min(half, twice)
        assert row.string.endswith(f"loss {best:.2f}")


def test_the_places_where_training_stays_are_no_accident():
    """The best constant of three of the four answers, or of two, leaves these mean losses."""
    answers = np.array([0, 1, 1, 0])
    assert ((answers[:3] - answers[:3].mean()) ** 2).sum() / 4 == pytest.approx(1 / 6)
    assert ((answers[:2] - answers[:2].mean()) ** 2).sum() / 4 == 1 / 8
    display = re.findall(r"final losses \[(.*)\]", find_section("4."))
    ends = [float(loss) for line in display for loss in line.split(", ")]
    assert len(ends) == 30
    assert {round(loss, 2) for loss in ends} >= {0.0, 0.12, 0.17}


def test_noise_falls_as_the_page_shows_up_to_its_luck():
    rows = re.findall(r"^B = +(\d+): noise .*, B \* noise ([\d.]+)", find_section("1."), re.M)
    assert [size for size, _ in rows] == ["1", "4", "16", "64"]
    one = float(rows[0][1])
    for size, product in rows:  # 50 shuffles of 28 batches or more: a few per cent of luck
        expected = one * (1792 - int(size)) / 1791
        assert float(product) == pytest.approx(expected, rel=0.03)


def test_no_line_has_a_smaller_largest_error_than_three_quarters():
    """Weigh the errors at three points so that no line changes the sum, which is 1.5."""
    x, y = np.array([0, 3, 4]), np.array([0, 3, 6])
    weights = np.array([1 / 4, -1, 3 / 4])
    assert weights @ x == 0
    assert weights.sum() == 0  # so that no line changes it
    assert weights @ y == 1.5
    assert np.abs(weights).sum() == 2  # so one of the errors is 1.5 / 2 at least
    section = " ".join(find_section("2.").split())
    assert "0.75, which is the best that a line can do" in section
    assert float(re.search(r"Max .*largest error ([\d.]+)", section)[1]) == pytest.approx(0.75, 0.1)
