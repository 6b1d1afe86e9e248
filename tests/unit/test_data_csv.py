"""CSV files become examples, or are refused with the line.

Oracle: the writer of the standard library's csv, and Python's repr, which reads back exactly.
"""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data import load_csv
from anybatch.errors import DataError
from properties import seeded_examples

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
GOOD = "a,b,y\n1,2,0\n3,4.5,1\n"


def write_file(folder: Path, content: bytes | str) -> str:
    """Write a file with this content, and return its path."""
    (folder / "t.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / "t.csv")


@given(
    rows=st.lists(st.tuples(FINITE, FINITE, st.integers(-(2**63), 2**63 - 1)), min_size=1),
    names=st.lists(NAMES, min_size=3, max_size=3, unique=True),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
)
@seeded_examples(60)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[float, float, int]],
    names: list[str],
    delimiter: str,
    end: str,
) -> None:
    names = [f"{name}?" for name in names]  # none is a number, or the mark of UTF-8
    out = io.StringIO(newline="")
    write = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
    write.writerows([names, *rows])
    path = write_file(tmp_path_factory.mktemp("csv"), out.getvalue())
    examples = load_csv(path, target=names[2], inputs=[names[1], names[0]], delimiter=delimiter)
    assert examples.inputs.tolist() == [[b, a] for a, b, _ in rows]
    assert examples.targets.tolist() == [y for *_, y in rows]


def test_columns_exchanged_are_other_inputs(tmp_path: Path) -> None:  # the control
    path = write_file(tmp_path, GOOD)
    assert load_csv(path, "y", ["a", "b"]).inputs.tolist() == [[1, 2], [3, 4.5]]
    assert load_csv(path, "y", ["b", "a"]).inputs.tolist() == [[2, 1], [4.5, 3]]


def test_all_other_columns_are_inputs_and_one_may_be_named_alone(tmp_path: Path) -> None:
    path = write_file(tmp_path, GOOD)
    assert load_csv(path, "a").inputs.tolist() == [[2, 0], [4.5, 1]]
    assert load_csv(path, "y", "b").inputs.tolist() == [[2], [4.5]]


def test_targets_are_classes_if_all_are_integers_and_numbers_otherwise(tmp_path: Path) -> None:
    path = write_file(tmp_path, GOOD)
    assert load_csv(path, "y").targets.dtype == torch.int64
    assert load_csv(path, "b").targets.tolist() == [2, 4.5]
    assert load_csv(path, "b").targets.dtype == torch.float64


def test_sample_weights_are_a_column_that_is_no_input_unless_asked_for(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a,w,y\n1,0,0\n3,2.5,1\n")  # a single 0 is legal
    examples = load_csv(path, "y", weights="w")
    assert examples.weights is not None
    assert examples.weights.tolist() == [0, 2.5]
    assert examples.inputs.tolist() == [[1], [3]]
    assert load_csv(path, "y", ["a", "w"], weights="w").inputs.tolist() == [[1, 0], [3, 2.5]]
    unweighted = load_csv(path, "y")  # control
    assert unweighted.weights is None
    assert unweighted.inputs.tolist() == [[1, 0], [3, 2.5]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("1,-1e-9", "line 3: the weight in 'w' is -1e-09. It must be at least 0"),
        ("-0.5,-2", "line 2: the weight in 'w' is -0.5"),
        ("1,nan", "line 3: column 'w' holds 'nan'. It must be a finite number"),
        ("inf,1", "line 2: column 'w' holds 'inf'. It must be a finite number"),
        ("1,", "line 3: column 'w' holds ''"),
        ("1,heavy", "line 3: column 'w' holds 'heavy'"),
        ("0,-0.0", "lines 2 to 3: all weights in 'w' are 0. At least one must be above 0"),
    ],
)
def test_weights_that_cannot_be_are_refused_with_their_line(
    tmp_path: Path, column: str, message: str
) -> None:
    first, second = column.split(",")
    path = write_file(tmp_path, f"a,w,y\n1,{first},0\n3,{second},1\n")
    with pytest.raises(DataError, match=message):
        load_csv(path, "y", weights="w")


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    text = '\ufeff"a,\r\nfirst";"y"\r\n"1";" 0 "\r\n\r\n2e-1;1\r\n'
    path = write_file(tmp_path, text)
    examples = load_csv(path, target="y", inputs="a,\r\nfirst", delimiter=";")
    assert examples.inputs.tolist() == [[1], [0.2]]
    assert examples.targets.tolist() == [0, 1]


def test_text_labels_are_refused_with_a_mapping_that_works(tmp_path: Path) -> None:
    path = write_file(tmp_path, "x,animal\n1,dog\n2,cat\n3,dog\n4,eel\n")
    mapping = r"3 distinct ones, which sorted become 'cat' = 0, 'dog' = 1, 'eel' = 2"
    with pytest.raises(
        DataError, match=rf"'animal' holds text \('dog' in line 2\).* {mapping}"
    ) as e:
        load_csv(path, "animal")
    offered = str(e.value).rpartition("data.args.labels = ")[2]
    assert offered == "['cat', 'dog', 'eel']."
    assert load_csv(path, "animal", labels=["cat", "dog", "eel"]).targets.tolist() == [1, 0, 1, 2]
    assert load_csv(path, "animal", labels=["eel", "dog", "cat"]).targets.tolist() == [1, 2, 1, 0]
    with pytest.raises(DataError, match=r"line 5: the label 'eel' is not in .*\['cat', 'dog'\]"):
        load_csv(path, "animal", labels=["cat", "dog"])
    with pytest.raises(DataError, match=r"Each label must be in it once"):
        load_csv(path, "animal", labels=["cat", "dog", "eel", "cat"])


def test_of_many_labels_some_are_shown(tmp_path: Path) -> None:
    rows = "".join(f"{n},n{n:02}\n" for n in range(33))
    with pytest.raises(DataError, match=r"33 distinct .* 'n19' = 19, and 13 more\. .* and so on"):
        load_csv(write_file(tmp_path, "x,y\n" + rows), "y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,y\n1,0\n\xe92,1\n", r"byte 8 \(counted from 0, in line 3\) is 0xe9, .* UTF-8.* iconv"),
        ("a,y\n1,0\n1,2,3\n", "line 3 has 3 cells. The first line has 2"),
        ("a,y\n1,0\n1\n", "line 3 has 1 cells. The first line has 2.* cut off"),
        ("a,y\n1,0\nx,1\n", "line 3: column 'a' holds 'x'. It must be a finite number"),
        ("a,y\n1,0\n,1\n", "line 3: column 'a' holds ''. It must be a finite"),
        ("a,y\n1,0\nnan,1\n", "line 3: column 'a' holds 'nan'. It must be a finite"),
        ("a,y\n1,0\n\n1_0,1\n", "line 4: column 'a' holds '1_0'"),
        ("a,y\n1,0\n1,NaN\n", "line 3: column 'y' holds 'NaN'"),
        ("a,y\n1,0\n1,\n", "line 3: column 'y' holds ''"),
        ("a,y\n1,0\n1,-inf\n", "line 3: column 'y' holds '-inf'"),
        (
            "a,y\n1,9223372036854775808\n",
            r"line 2: 9223372036854775808 in 'y' does not fit in 64 bits",
        ),
        ('a,y\n1,0\n"1,0\n', r"line 3: .*Is a quote not closed"),
        ("1,2\n3,4\n", "begins with '1, 2'. It must begin with a line of column names"),
        ("", "begins with ''. It must begin with a line of column names"),
        ("a,y\n", "no line below its column names"),
        (",a,y\n0,1,0\n", r"Each needs a name of its own.* to_csv\(index=False\)"),
        ("a,a,y\n0,1,0\n", "Each needs a name of its own"),
        ("a,target\n0,1\n", r"no column 'y'\. It has: 'a', 'target'"),
        ("a;b;y\n0;1;1\n", "has no column 'y'.* Is the delimiter another one"),
        ("a,yy\n0,1\n", "has no column 'y'; did you mean 'yy'"),
        ("y\n1\n", r"The inputs .* are \[\]. Name at least one column"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_csv(write_file(tmp_path, content), target="y")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"inputs": ["a", "c"]}, r"no column 'c'"),
        ({"inputs": ["a", "y"]}, "'y' is both the target and an input"),
        ({"inputs": ["a", "a"]}, "Name at least one column, each once"),
        ({"inputs": []}, "Name at least one column"),
        ({"weights": "w"}, "no column 'w'"),
        ({"weights": "y"}, "'y' is both target and weights. Name a column for each"),
        ({"delimiter": "::"}, "delimiter = '::'. It must be one character"),
        ({"delimiter": '"'}, "It must be one character"),
        ({"path": "gone.csv"}, r"gone.csv cannot be read .* It should be a CSV file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    arguments = {"path": write_file(tmp_path, GOOD), "target": "y", **args}
    with pytest.raises(DataError, match=message):
        load_csv(**arguments)
