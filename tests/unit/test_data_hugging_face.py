"""Hugging Face data sets on disk become examples, without a network.

Oracle: `datasets` itself writes Python's own numbers and lists; what is read must be these.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data.hugging_face import load_hugging_face
from anybatch.errors import DataError
from properties import seeded_examples

datasets = pytest.importorskip("datasets")
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a network is refused."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("there was to be no network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    datasets.disable_progress_bars()


def save_data(path: Path, columns: dict[str, Any], features: Any = None, rows: Any = None) -> str:
    """A folder with these columns, or those rows of them."""
    data = datasets.Dataset.from_dict(columns, features=features)
    (data if rows is None else data.select(rows)).save_to_disk(path)
    return str(path)


@given(st.data(), st.integers(1, 12), st.integers(1, 4))
@seeded_examples(20)
def test_what_is_saved_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: Any, count: int, size: int
) -> None:
    def rows(each: st.SearchStrategy[Any]) -> Any:
        return data.draw(st.lists(each, min_size=count, max_size=count))

    vectors, numbers = rows(st.lists(FINITE, min_size=size, max_size=size)), rows(FINITE)
    classes, weights = rows(st.integers(0, 9)), [1.0 + n for n in range(count)]
    columns = {"v": vectors, "x": numbers, "y": classes, "w": weights}
    path = save_data(tmp_path_factory.mktemp("hugging") / "set", columns)
    examples = load_hugging_face(path, "y", ["x", "v"], weights="w")
    assert examples.inputs.tolist() == [[x, *v] for x, v in zip(numbers, vectors, strict=True)]
    assert examples.targets.tolist() == classes
    assert examples.weights is not None
    assert examples.weights.tolist() == weights
    assert load_hugging_face(path, "v", "x").targets.tolist() == vectors


def test_columns_exchanged_are_other_inputs(tmp_path: Path) -> None:  # the control
    path = save_data(tmp_path / "set", {"a": [1.0, 2.0], "b": [3.0, 4.0], "y": [0, 1]})
    assert load_hugging_face(path, "y").inputs.tolist() == [[1, 3], [2, 4]]
    assert load_hugging_face(path, "y", ["b", "a"]).inputs.tolist() == [[3, 1], [4, 2]]


def test_rows_chosen_before_saving_are_those(tmp_path: Path) -> None:
    path = save_data(tmp_path / "set", {"x": [1, 2, 3, 4], "y": [0, 1, 2, 3]}, rows=[3, 1])
    examples = load_hugging_face(path, "y")
    assert (examples.inputs.tolist(), examples.targets.tolist()) == ([[4], [2]], [3, 1])


def test_features_of_fixed_shape_and_named_classes_are_read(tmp_path: Path) -> None:
    images = [
        [[float(10 * row + column + n) for column in range(3)] for row in range(2)] for n in (0, 50)
    ]
    features = datasets.Features(
        image=datasets.Array2D((2, 3), "float32"),
        y=datasets.ClassLabel(names=["cat", "dog"]),
    )
    path = save_data(tmp_path / "set", {"image": images, "y": ["dog", "cat"]}, features)
    examples = load_hugging_face(path, "y")
    assert examples.inputs.tolist() == images
    assert examples.inputs.dtype == torch.float32
    assert examples.targets.tolist() == [1, 0]


def test_text_labels_are_refused_with_a_mapping_that_works(tmp_path: Path) -> None:
    path = save_data(tmp_path / "set", {"x": [1, 2, 3], "y": ["dog", "cat", "dog"]})
    mapping = r"'cat' = 0, 'dog' = 1\. .*data.args.labels = \['cat', 'dog'\]"
    with pytest.raises(DataError, match=rf"'y' holds text \('dog' in row 0\).* {mapping}"):
        load_hugging_face(path, "y")
    assert load_hugging_face(path, "y", labels=["cat", "dog"]).targets.tolist() == [1, 0, 1]


def test_a_split_is_named(tmp_path: Path) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"x": [value], "y": [0]})
        for name, value in (("train", 1.0), ("test", 2.0))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    path = str(tmp_path / "both")
    assert load_hugging_face(path, "y", split="test").inputs.tolist() == [[2]]
    with pytest.raises(DataError, match=r"split is not set. It holds 'test', 'train'\. Name"):
        load_hugging_face(path, "y")
    with pytest.raises(DataError, match=r"split = 'dev'. It holds 'test', 'train'\. Name one"):
        load_hugging_face(path, "y", split="dev")
    one = save_data(tmp_path / "one", {"x": [1], "y": [0]})
    with pytest.raises(
        DataError, match=r"split = 'train', but it holds one data set, without splits. Take"
    ):
        load_hugging_face(one, "y", split="train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": ["a", "b"]}, "column 'x' is string. It must hold numbers"),
        ({"x": [[1.0, 2.0], [3.0]]}, "'x' has a list of 1 in row 1 and of 2 in row 0"),
        ({"x": [1.0, None]}, "column 'x' is empty in row 1"),
        ({"x": [1.0, float("nan")]}, "inputs hold nan in example 1"),
        ({"x": [{"a": 1}, {"a": 2}]}, "column 'x' is struct"),
        ({"x": [1.0, 2.0], "w": [1.0, -1.0]}, "weight of example 1 is -1. It must be at least 0"),
        ({"x": [1.0, 2.0], "w": [0.0, 0.0]}, "All weights are 0"),
        ({"yy": [1, 2], "y": None}, "no column 'y'; did you mean 'yy'"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    content = {n: column for n, column in ({"y": [0, 1]} | columns).items() if column is not None}
    with pytest.raises(DataError, match=message):
        load_hugging_face(
            save_data(tmp_path / "set", content), "y", weights="w" if "w" in content else None
        )


def test_a_folder_that_is_missing_another_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf://datasets/squad is a URL"):
        load_hugging_face("hf://datasets/squad", "y")
    for name in ("squad", str(tmp_path / "gone")):
        with pytest.raises(DataError, match=r"is no folder. Name one that a data set was saved"):
            load_hugging_face(name, "y")
    with pytest.raises(
        DataError, match=r"holds no data set that can be read: .* Was it saved with"
    ):
        load_hugging_face(str(tmp_path), "y")
    path = save_data(tmp_path / "set", {"x": [1, 2, 3], "y": [0, 1, 0]})
    for file in Path(path).iterdir():
        whole = file.read_bytes()
        for damage in (whole[:-20], whole[: len(whole) // 3], b""):
            file.unlink()  # what is mapped keeps its file
            file.write_bytes(damage)
            with pytest.raises(DataError, match=r"set holds no data set that can be read"):
                load_hugging_face(path, "y")
        file.unlink()
        file.write_bytes(whole)
    assert load_hugging_face(path, "y").targets.tolist() == [0, 1, 0]  # the control


def test_a_missing_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'anybatch\[huggingface\]'"):
        load_hugging_face(str(tmp_path), "y")
