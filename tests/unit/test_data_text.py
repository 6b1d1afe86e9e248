"""Text as windows of tokens.

Oracle: Python's own slices of the text, and its sorted set of characters.
"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data import Text, load_text
from anybatch.data.text import decode, load_lines
from anybatch.errors import DataError
from properties import seeded_examples


def write_file(folder: Path, content: bytes | str) -> str:
    """Write a file with this content, and return its path."""
    (folder / "t.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / "t.txt")


def windows(text: bytes | str, length: int, shift: int) -> list[bytes | str]:
    """Slices of a text: as many as have a next token for each of theirs."""
    starts = range(shift, len(text) - length + shift, length)
    return [text[start : start + length] for start in starts if start - shift + length < len(text)]


def decode_all(text: Text) -> tuple[list[bytes | str], list[bytes | str]]:
    """Inputs and targets, as the vocabulary spells them."""
    return [text.decode(row) for row in text.inputs], [text.decode(row) for row in text.targets]


@given(st.text(st.characters(codec="utf-8"), min_size=2, max_size=40), st.integers(1, 6))
@seeded_examples(60)
def test_characters_are_windows_of_the_text_and_of_the_text_one_on(
    tmp_path_factory: pytest.TempPathFactory, text: str, length: int
) -> None:
    length = min(length, len(text) - 1)
    path = write_file(tmp_path_factory.mktemp("text"), text)
    result = load_text(path, unit="characters", length=length)
    assert result.vocabulary == "".join(sorted(set(text)))
    assert decode_all(result) == (windows(text, length, 0), windows(text, length, 1))


@given(st.binary(min_size=2, max_size=40), st.integers(1, 6))
@seeded_examples(60)
def test_bytes_are_their_own_ids(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, length: int
) -> None:
    length = min(length, len(content) - 1)
    result = load_text(write_file(tmp_path_factory.mktemp("text"), content), length=length)
    assert result.inputs.flatten().tolist() == list(content[: result.inputs.numel()])
    assert decode_all(result) == (windows(content, length, 0), windows(content, length, 1))


def test_targets_that_are_not_shifted_are_told_apart(tmp_path: Path) -> None:  # the control
    result = load_text(write_file(tmp_path, "abcdefg"), length=3)
    assert decode_all(result) == ([b"abc", b"def"], [b"bcd", b"efg"])
    assert windows(b"abcdefg", 3, 0) != windows(b"abcdefg", 3, 1)


def test_tokens_are_int64_and_stay_so(tmp_path: Path) -> None:
    for unit in ("bytes", "characters"):
        result = load_text(write_file(tmp_path, "to be or not to be"), unit=unit, length=4)
        for examples in (result, result.to(torch.float64), result.select(torch.tensor([1, 0]))):
            assert {tensor.dtype for tensor in examples.columns} == {torch.int64}
            assert {tensor.shape[1:] for tensor in examples.columns} == {(4,)}


def test_the_vocabulary_survives_copies(tmp_path: Path) -> None:
    result = load_text(write_file(tmp_path, "déjà vu"), unit="characters", length=3)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other.vocabulary == " djuvàé"
        assert other.decode(other.inputs[0]) == "déj"


@given(st.text("ab\n\r", min_size=1, max_size=30), st.integers(1, 5))
@seeded_examples(100)
def test_lines_run_from_the_end_of_the_one_before_to_their_own(
    tmp_path_factory: pytest.TempPathFactory, text: str, length: int
) -> None:
    path = write_file(tmp_path_factory.mktemp("text"), text)
    for unit in ("bytes", "characters"):
        result = load_lines(path, unit=unit, length=length)
        pairs = [[decode(column, result.vocabulary) for column in pair] for pair in result]
        pairs = [[x.decode() if unit == "bytes" else x for x in pair] for pair in pairs]
        wanted = []
        for line in text.removesuffix("\n").split("\n"):  # the oracle: Python's own lines
            whole = ["\n" + line, line + "\n"]
            starts = range(0, len(whole[0]), length)
            wanted += [[column[start : start + length] for column in whole] for start in starts]
        assert pairs == wanted
        assert "".join(target for _, target in pairs) == text.removesuffix("\n") + "\n"


def test_lines_that_are_cut_elsewhere_are_told_apart(tmp_path: Path) -> None:  # the control
    result = load_lines(write_file(tmp_path, "ab\n\ncd"))
    pairs = [[decode(column, result.vocabulary) for column in pair] for pair in result]
    assert pairs == [[b"\nab", b"ab\n"], [b"\n", b"\n"], [b"\ncd", b"cd\n"]]
    assert len(load_lines(write_file(tmp_path, "ab\r\rcd"))) == 1


def test_lines_without_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 0 bytes"):
        load_lines(write_file(tmp_path, ""))
    with pytest.raises(DataError, match=r"length = 0. Both must be at least 1"):
        load_lines(write_file(tmp_path, "a"), length=0)
    with pytest.raises(DataError, match=r"unit = 'words'. It must be 'bytes' or 'characters'"):
        load_lines(write_file(tmp_path, "a"), unit="words")
    with pytest.raises(DataError, match=r"byte 2 .* not valid UTF-8"):
        load_lines(write_file(tmp_path, b"ab\xc3"), unit="characters")


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_the_help_texts_of_python_are_built_in(unit: str) -> None:
    result = load_text("pydoc_topics", unit=unit, length=100)
    assert len(result.inputs) > 3000
    start = result.decode(result.inputs[0])
    assert (
        'The "assert" statement' if unit == "characters" else b'The "assert" statement'
    ) in start
    again = load_text("pydoc_topics", unit=unit, length=100)
    assert torch.equal(result.inputs, again.inputs)
    assert result.vocabulary == again.vocabulary


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"ab\nc\xffd", {"unit": "characters"}, r"byte 4 .*in line 2\) is 0xff.*unit = 'bytes'"),
        (b"ab\xc3", {"unit": "characters"}, r"byte 2 .* not valid UTF-8"),
        (b"abc", {"length": 3}, "holds 3 bytes and data.args.length = 3. It must be"),
        (b"abc", {"length": 0}, "data.args.length = 0. It must be at least 1"),
        (b"", {}, "holds 0 bytes"),
        (b"abc", {"unit": "words"}, "unit = 'words'. It must be 'bytes' or 'characters'"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tmp_path: Path, content: bytes, args: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_text(write_file(tmp_path, content), **args)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    for unit in ("bytes", "characters"):
        with pytest.raises(DataError, match=r"cannot be read .* It should be a text file"):
            load_text(str(tmp_path / "gone"), unit=unit)
