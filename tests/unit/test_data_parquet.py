"""Parquet files become examples, or are refused with the row.

Oracle: pyarrow's writer, given Python's own numbers and lists. What comes through a cache, in
pieces of a few rows, must be the same to the last bit; test_data_stored.py has the rest of it.
"""

import base64
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data import Examples, load_parquet, parquet
from anybatch.data.stored import Stored
from anybatch.errors import DataError
from properties import seeded_examples

WHOLE_OR_CACHED = pytest.mark.parametrize("cache", [False, True], ids=["whole", "cached"])
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def write_file(
    folder: Path, columns: dict[str, Any], name: str = "t.parquet", **options: Any
) -> str:
    """Write a file with these columns, and return its path."""
    pq.write_table(pa.table(columns), folder / name, **options)
    return str(folder / name)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are made a row or two at a time."""
    monkeypatch.setattr(parquet, "PIECE_BYTES", 20)


def inputs_of(examples: Examples | Stored) -> Any:
    """All inputs, as lists."""
    if isinstance(examples, Examples):
        return examples.inputs.tolist()
    return examples.inputs.rows(torch.arange(len(examples))).tolist()


def fixed(rows: list[Any], size: int, kind: pa.DataType | None = None) -> pa.Array:
    """A column of lists that declare their length."""
    return pa.array(rows, pa.list_(kind or pa.float64(), size))


@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.integers(1, 5))
@seeded_examples(30)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    data: Any,
    count: int,
    size: int,
    declared: bool,
    row_group_size: int,
) -> None:
    def rows(each: st.SearchStrategy[Any]) -> Any:
        return data.draw(st.lists(each, min_size=count, max_size=count))

    def read(target: str, inputs: Any) -> tuple[Any, Any]:
        whole = load_parquet(path, target, inputs)
        cached = load_parquet(path, target, inputs, cache=True)
        assert inputs_of(cached) == inputs_of(whole)
        assert cached.targets.tolist() == whole.targets.tolist()
        return inputs_of(whole), whole.targets.tolist()

    vectors, numbers = rows(st.lists(FINITE, min_size=size, max_size=size)), rows(FINITE)
    classes = rows(st.integers(-(2**63), 2**63 - 1))
    columns = {"v": fixed(vectors, size) if declared else vectors, "x": numbers, "y": classes}
    folder = tmp_path_factory.mktemp("parquet")
    path = write_file(folder, columns, row_group_size=row_group_size)
    assert read("y", "v") == (vectors, classes)
    both = [[x, *v] for x, v in zip(numbers, vectors, strict=True)]
    assert read("y", ["x", "v"]) == (both, classes)
    assert read("v", "x") == ([[x] for x in numbers], vectors)


def test_columns_exchanged_are_other_inputs(tmp_path: Path) -> None:  # the control
    path = write_file(tmp_path, {"a": [1.0, 2.0], "b": [3.0, 4.0], "y": [0, 1]})
    assert load_parquet(path, "y").inputs.tolist() == [[1, 3], [2, 4]]
    assert load_parquet(path, "y", ["b", "a"]).inputs.tolist() == [[3, 1], [4, 2]]


@WHOLE_OR_CACHED
@pytest.mark.parametrize(
    ("column", "dtype", "expected"),
    [
        (pa.array([1, 2], pa.uint8()), torch.float32, [[1], [2]]),
        (pa.array([True, False]), torch.float32, [[1], [0]]),
        (pa.array([0.5, 2], pa.float16()), torch.float32, [[0.5], [2]]),
        (pa.array([0.1, 2], pa.float64()), torch.float64, [[0.1], [2]]),
        (pa.array([3, 3]).dictionary_encode(), torch.float32, [[3], [3]]),
        (pa.array([[1, 2], [3, 4]], pa.large_list(pa.int64())), torch.float32, [[1, 2], [3, 4]]),
        (fixed([[[1], [2]], [[3], [4]]], 2, pa.list_(pa.int8(), 1)), torch.float32, None),
    ],
    ids=str,
)
def test_every_kind_of_number_is_read(
    tmp_path: Path, column: Any, dtype: torch.dtype, expected: Any, cache: bool
) -> None:
    examples = load_parquet(write_file(tmp_path, {"x": column, "y": [0, 1]}), "y", cache=cache)
    assert examples.inputs.dtype == dtype
    assert inputs_of(examples) == (expected or [[[1], [2]], [[3], [4]]])


@WHOLE_OR_CACHED
def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path, cache: bool) -> None:
    for name, value in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        write_file(tmp_path, {"x": [value], "y": [0]}, f"{name}.parquet")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    assert inputs_of(load_parquet(str(tmp_path), "y", cache=cache)) == [[1], [2], [3]]
    write_file(tmp_path, {"x": [1], "y": [0]}, "d.parquet")
    with pytest.raises(DataError, match=r"d.parquet has the columns x \(int64\), y .* a.parquet"):
        load_parquet(str(tmp_path), "y", cache=cache)


def test_the_index_that_pandas_writes_is_no_input(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"x": [1.0], "y": [0], "__index_level_0__": [7]})
    assert load_parquet(path, "y").inputs.tolist() == [[1]]
    assert load_parquet(path, "y", "__index_level_0__").inputs.tolist() == [[7]]


@WHOLE_OR_CACHED
@pytest.mark.parametrize("encoded", [False, True])
def test_text_labels_are_refused_with_a_mapping_that_works(
    tmp_path: Path, encoded: bool, cache: bool
) -> None:
    animals = pa.array(["dog", "cat", "dog"])
    columns = {"x": [1, 2, 3], "y": animals.dictionary_encode() if encoded else animals}
    path = write_file(tmp_path, columns)
    mapping = r"'cat' = 0, 'dog' = 1\. .*data.args.labels = \['cat', 'dog'\]"
    with pytest.raises(DataError, match=rf"'y' holds text \('dog' in row 0\).* {mapping}"):
        load_parquet(path, "y", cache=cache)
    assert load_parquet(path, "y", labels=["cat", "dog"], cache=cache).targets.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"row 1: the label 'cat' is not in"):
        load_parquet(path, "y", labels=["dog"], cache=cache)
    path = write_file(tmp_path, {"x": [1, 2], "y": [0, 1]})
    with pytest.raises(
        DataError, match=r"labels is set, but the target column 'y' is int64, not text"
    ):
        load_parquet(path, "y", labels=["0", "1"], cache=cache)


@WHOLE_OR_CACHED
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": ["a", "b"]}, "column 'x' is string. It must hold numbers"),
        (
            {"x": pa.array([0, 1], pa.timestamp("us"))},
            r"column 'x' is timestamp\[us\]. It must hold",
        ),
        ({"x": [[1.0, 2.0], [3.0]]}, "'x' has a list of 1 in row 1 and of 2 in row 0"),
        ({"x": [[["a"]], [["b"]]]}, "column 'x' is string"),
        ({"x": [1.0, None]}, "column 'x' is empty in row 1"),
        ({"x": fixed([[1.0, 2.0], None], 2)}, "column 'x' is empty in row 1"),
        ({"x": [[1.0, 2.0], [3.0, None]]}, "column 'x' is empty in row 1"),
        ({"x": [1.0, float("nan")]}, "inputs hold nan in example 1"),
        ({"z": [1, 2], "y": ["a", None]}, "column 'y' is empty in row 1"),
        ({"z": [1, 2], "y": [b"a", b"b"]}, "column 'y' is binary. It must hold numbers"),
        ({"z": [1, 2], "y": [[1, 2], [3]]}, "'y' has a list of 1 in row 1"),
        ({"yy": [1, 2], "y": None}, "no column 'y'; did you mean 'yy'"),
        ({}, r"The inputs .* are \[\]. Name at least one column"),
        ({"x": [], "y": pa.array([], pa.int64())}, "'x' is null. It must hold|set is empty"),
        ({"x": pa.array([], pa.int64()), "y": pa.array([], pa.int64())}, "data set is empty"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str, cache: bool
) -> None:
    content = {
        name: column for name, column in ({"y": [0, 1]} | columns).items() if column is not None
    }
    with pytest.raises(DataError, match=message):
        load_parquet(write_file(tmp_path, content), "y", cache=cache)


@WHOLE_OR_CACHED
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5, 2.0], "weight of example 1 is -0.5. It must be at least 0"),
        ([0.0, 0.0, 0.0], "All weights are 0"),
        ([1.0, float("nan"), 1.0], "weights hold nan in example 1"),
        ([1.0, None, 1.0], "column 'w' is empty in row 1"),
        (["a", "b", "c"], "column 'w' is string. It must hold numbers"),
        ([[1.0, 2.0]] * 3, r"weights are of shape \(3, 2\)"),
    ],
)
def test_weights_that_are_none_are_refused(
    tmp_path: Path, weights: list[Any], message: str, cache: bool
) -> None:
    path = write_file(tmp_path, {"x": [1, 2, 3], "y": [0, 1, 0], "w": weights})
    with pytest.raises(DataError, match=message):
        load_parquet(path, "y", weights="w", cache=cache)


@WHOLE_OR_CACHED
def test_weights_are_a_column_that_is_no_input(tmp_path: Path, cache: bool) -> None:
    path = write_file(tmp_path, {"w": [0.0, 0.5, 2.0], "x": [1, 2, 3], "y": [0, 1, 0]})
    examples = load_parquet(path, "y", weights="w", cache=cache)
    assert examples.weights is not None
    assert examples.weights.tolist() == [0, 0.5, 2]  # a single zero is legal
    assert inputs_of(examples) == [[1], [2], [3]]
    assert [len(column) for column in examples.columns] == [3, 3, 3]
    without = load_parquet(path, "y", cache=cache)  # the control
    assert inputs_of(without) == [[0, 1], [0.5, 2], [2, 3]]
    assert without.weights is None
    with pytest.raises(DataError, match=r"no column 'ww'; did you mean 'w'"):
        load_parquet(path, "y", weights="ww", cache=cache)


def declare_another_length(folder: Path) -> str:
    """A file whose schema declares lists of 2, with a list of 1 within."""
    table = pa.table({"x": [[1.0, 2.0], [3.0]], "y": [0, 1]})
    statement = pa.schema([("x", pa.list_(pa.float64(), 2)), ("y", pa.int64())])
    schema = base64.b64encode(statement.serialize().to_pybytes()).decode()
    with pq.ParquetWriter(folder / "f.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": schema})
    return str(folder / "f.parquet")


@WHOLE_OR_CACHED
def test_lists_that_break_their_declared_length_are_refused(tmp_path: Path, cache: bool) -> None:
    path = declare_another_length(tmp_path)
    assert pa.types.is_fixed_size_list(pq.read_schema(path).field("x").type)
    with pytest.raises(DataError, match=r"Expected all lists to be of size=2 .* had size=1"):
        load_parquet(path, "y", cache=cache)


@WHOLE_OR_CACHED
def test_a_file_that_is_cut_off_or_another_one_is_refused(tmp_path: Path, cache: bool) -> None:
    path = Path(write_file(tmp_path, {"x": [1, 2], "y": [0, 1]}))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"a,b\n1,2\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no readable Parquet file: .* Is it cut off"):
            load_parquet(str(path), "y", cache=cache)


@WHOLE_OR_CACHED
def test_a_flipped_byte_of_a_page_with_a_checksum_is_refused(tmp_path: Path, cache: bool) -> None:
    values = [1.25 * number for number in range(64)]
    plain = {"compression": "none", "use_dictionary": False}
    for with_checksum in (True, False):
        columns = {"x": values, "y": [0] * 64}
        path = Path(write_file(tmp_path, columns, write_page_checksum=with_checksum, **plain))
        content = bytearray(path.read_bytes())
        content[200] ^= 1  # within the values of x
        path.write_bytes(content)
        if with_checksum:
            with pytest.raises(DataError, match=r"no readable Parquet file: .*CRC"):
                load_parquet(str(path), "y", cache=cache)
        else:  # the control: nothing else would tell
            examples = inputs_of(load_parquet(str(path), "y", cache=cache))
            assert examples != [[value] for value in values]


def test_a_missing_file_a_bare_folder_and_a_missing_pyarrow_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path, tmp_path / "gone.parquet"):
        with pytest.raises(DataError, match=r"is no file and no folder with \*.parquet files"):
            load_parquet(str(path), "y")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'anybatch\[data\]'"):
        load_parquet(str(tmp_path), "y")
