"""Packed and encoded files are read, or refused for what they are; memory stays near the file's.

Oracles: the codecs and packers of the standard library write, and the plain file is what they
must read as; the kernel counts the memory.
"""

import bz2
import codecs
import gzip
import io
import lzma
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from anybatch.data import files, load_csv, load_idx, load_lines
from anybatch.errors import DataError

TABLE = "a,b,y\n" + "".join(f"{i},{i / 7!r},{i % 2}\n" for i in range(500))


def read(path):
    examples = load_csv(str(path), "y")
    return examples.inputs.tolist(), examples.targets.tolist()


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain.csv").write_text(TABLE)
    return read(tmp_path / "plain.csv")


WAYS = {
    "gzip": gzip.compress(TABLE.encode()),
    "two members": gzip.compress(TABLE[:900].encode()) + gzip.compress(TABLE[900:].encode()),
    "mark of UTF-8": codecs.BOM_UTF8 + TABLE.encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "UTF-16, big-endian": codecs.BOM_UTF16_BE + TABLE.encode("utf-16-be"),
    "UTF-16 without mark": TABLE.encode("utf-16-le"),
    "UTF-32": TABLE.encode("utf-32"),
    "UTF-16, gzipped": gzip.compress(TABLE.encode("utf-16")),
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_and_encoded_tables_read_as_the_plain_one(tmp_path, plain, way):
    path = tmp_path / "rows.csv"  # whatever its name: the content decides
    path.write_bytes(WAYS[way])
    assert read(path) == plain


def zip_text():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.csv", TABLE)
    return out.getvalue()


REFUSED = {
    "zip": (zip_text(), "is a zip archive"),
    "bzip2": (bz2.compress(TABLE.encode()), "is compressed by bzip2"),
    "xz": (lzma.compress(TABLE.encode()), "is compressed by xz"),
    "cut gzip": (WAYS["gzip"][:-200], "gzip file that cannot be unpacked"),
    "damaged gzip": (WAYS["gzip"][:99] + b"\xff" * 9 + WAYS["gzip"][108:], "cannot be unpacked"),
    "no text in gzip": (gzip.compress(b"a,y\n1,0\n\xe92,1\n"), r"byte 8 .* in line 3\) is 0xe9"),
    "half a character": (TABLE.encode("utf-16")[:-1], "UTF-16|within a character"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_read_is_told_as_what_it_is(tmp_path, way):
    content, message = REFUSED[way]
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read(tmp_path / "rows.csv")
    assert "iconv" not in str(refusal.value) or "byte 8" in str(refusal.value)


@pytest.mark.slow
def test_what_unpacks_without_end_is_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("anybatch.limits.UNPACKED_BYTES", 2**20)
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"a,y\n" + b"1,0\n" * 2**20))
    with pytest.raises(DataError, match=r"that unpack into .* or more. The limit is 1048576"):
        read(path)
    path.write_bytes(gzip.compress(b"a,y\n" + b"1,0\n" * 2**10))  # the control
    assert len(read(path)[1]) == 2**10


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    (tmp_path / "rows.csv").write_text("a,y\n1,0\n" + "0" * 2000)
    with pytest.raises(DataError, match=r"line 3 has more than 1,000 characters"):
        read(tmp_path / "rows.csv")


def test_an_idx_file_is_unpacked_no_further_than_it_states(tmp_path):
    header = b"\0\0\x08\x01\0\0\0\x03"
    images = b"\0\0\x08\x03\0\0\0\x03\0\0\0\x01\0\0\0\x01"
    (tmp_path / "images").write_bytes(gzip.compress(images + bytes(3)))
    (tmp_path / "labels").write_bytes(gzip.compress(header + bytes([0, 1, 2])))
    examples = load_idx(str(tmp_path / "images"), str(tmp_path / "labels"))
    assert examples.targets.tolist() == [0, 1, 2]
    (tmp_path / "labels").write_bytes(gzip.compress(header + bytes(2**26)))
    with pytest.raises(DataError, match=r"followed by others"):
        load_idx(str(tmp_path / "images"), str(tmp_path / "labels"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_text_with_a_mark_reads_as_without(tmp_path, encoding):
    (tmp_path / "marked.txt").write_text("één\ntwee\n", encoding=encoding)
    (tmp_path / "plain.txt").write_text("één\ntwee\n", encoding="utf-8")
    marked, plain = (
        load_lines(str(tmp_path / f"{name}.txt"), "characters") for name in ("marked", "plain")
    )
    assert marked.vocabulary == plain.vocabulary
    assert torch.equal(marked.values, plain.values)


def test_progress_is_told_where_reading_takes_long(tmp_path, monkeypatch, caplog):
    (tmp_path / "rows.csv").write_text("a,y\n" + "1,0\n" * 5000)
    read(tmp_path / "rows.csv")
    assert caplog.messages == []
    monkeypatch.setattr(files, "SECONDS", 0.0)
    read(tmp_path / "rows.csv")
    assert caplog.messages
    assert all("reading" in message and "%" in message for message in caplog.messages)


PEAK = """
import resource, sys
import torch
from anybatch.data import load_csv
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.zeros(1).isfinite(), torch.zeros(2).aminmax()
before = peak()
data = load_csv(sys.argv[1], "y").to(torch.float32)
print(peak() - before, len(data.targets))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cells", ["%.6f", "%.2f", "%d"])
def test_a_table_takes_at_most_three_times_its_file(tmp_path, cells):
    path, generator = tmp_path / "rows.csv", np.random.default_rng(0)
    block = generator.uniform(0, 256, (2000, 40))
    block[:, -1] = np.arange(2000) % 2
    text = io.StringIO()
    np.savetxt(text, block, cells, delimiter=",")
    names = ",".join([*(f"x{i}" for i in range(39)), "y"])
    repeats = 20_000_000 // len(text.getvalue())
    path.write_text(names + "\n" + text.getvalue() * repeats)
    report = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, check=True)
    grown, rows = map(int, report.stdout.split())
    assert rows == 2000 * repeats
    assert grown < 3 * path.stat().st_size
