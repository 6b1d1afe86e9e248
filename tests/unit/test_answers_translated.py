"""Four translations of docs/answers.md: the same questions: same questions, no other number.

Each section of a translation has a question for each follow-up of the English section, and every
number in it stands in that English section, in its prose, its code or its output. The table of
wrong ideas has the figures that the English page prints.
"""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = ("pt", "es", "pl", "ru")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")
PROPER = re.compile(r"`[^`]*`|\[[^]]*\]\([^)]*\)")  # code and links


def read_sections(text: str) -> list[str]:
    """Split a page at its second-level headings; the first section is what comes before them."""
    fences = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    hidden = fences.sub(lambda m: m.group().replace("\n## ", "\n "), text)
    return re.split(r"^## ", hidden, flags=re.MULTILINE)


def read_numbers(text: str) -> set[float]:
    """Return every number of a text by its value."""
    return {float(number) for number in NUMBER.findall(text)}


def find_strange_numbers(translation: str, english: str) -> list[tuple[int, float]]:
    """Return the numbers that the English section of the same place lacks, with the section."""
    pairs = zip(read_sections(translation)[1:], read_sections(english)[1:], strict=True)
    return [
        (place, number)
        for place, (ours, theirs) in enumerate(pairs, start=1)
        for number in sorted(read_numbers(PROPER.sub("", ours)) - read_numbers(theirs))
        if number not in range(1, 6)  # numbers of questions and weights
    ]


def read_wrong_ideas(text: str) -> list[tuple[float, ...]]:
    """Return distance, cosine and loss of each idea of a page, from its table or its output."""
    last = read_sections(text)[-1]
    row = re.compile(
        r"(?:distance|\|) +(\d\.\d{3}) +(?:cosine|\|) +(-?\d\.\d{3}) +(?:loss|\|) +(\d\.\d\d)"
    )
    return [tuple(map(float, match)) for match in row.findall(last)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_every_question_and_no_number_of_its_own(language: str) -> None:
    english = (DOCS / "answers.md").read_text(encoding="utf8")
    page = (DOCS / f"answers.{language}.md").read_text(encoding="utf8")
    assert [s.count("\n### ") for s in read_sections(page)] == [
        s.count("\n### ") for s in read_sections(english)
    ]
    assert len(read_numbers(page)) > 60
    assert find_strange_numbers(page, english) == []
    assert len(read_wrong_ideas(page)) == 7
    assert read_wrong_ideas(page) == read_wrong_ideas(english)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_update_of_question_1_has_its_signs(language: str) -> None:
    page = (DOCS / f"answers.{language}.md").read_text(encoding="utf8")
    rows = [
        [float(cell) for cell in line.split("|")[2:-1]]
        for line in read_sections(page)[1].splitlines()
        if re.match(r"\|[^|]+\| -?\d", line)
    ]
    first, second, mean, before, after = rows
    for i in range(5):
        assert (first[i] + second[i]) / 2 == pytest.approx(mean[i], abs=1e-12)
        assert before[i] - 0.1 * mean[i] == pytest.approx(after[i], abs=1e-12)


def test_a_changed_number_and_a_lost_sign_are_found() -> None:  # the control
    english = (DOCS / "answers.md").read_text(encoding="utf8")
    page = (DOCS / "answers.pl.md").read_text(encoding="utf8")
    assert find_strange_numbers(page.replace("29.6614", "29.6641"), english) == [(2, 29.6641)]
    assert find_strange_numbers(page.replace("-0.097", "0.097"), english) == [(6, 0.097)]
    assert read_wrong_ideas(page.replace("2.998", "2.988")) != read_wrong_ideas(english)
