"""Arrays become examples, or are refused with the reason.

Oracle: NumPy's own conversion of the same values.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets

from anybatch.data import Examples, load_digits, load_npz
from anybatch.data.arrays import check_classes
from anybatch.errors import DataError


@pytest.mark.parametrize("dtype", ["b", "B", "h", "H", "i", "I", "q", "Q", "?"])
def test_integer_targets_of_any_width_become_int64(dtype: str) -> None:
    source = np.array([0, 1, 1], dtype)
    targets = Examples.from_arrays(np.zeros((3, 2)), source).targets
    assert targets.dtype == torch.int64
    assert targets.tolist() == [0, 1, 1]


def test_the_largest_integers_are_kept_and_larger_ones_refused() -> None:
    largest = np.array([2**63 - 1], np.uint64)
    assert Examples.from_arrays([[1.0]], largest).targets.tolist() == [2**63 - 1]
    with pytest.raises(
        DataError, match=r"targets hold 9223372036854775808. Integers must be below 2\^63"
    ):
        Examples.from_arrays([[1.0]], largest + np.uint64(1))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("e", "f4"), ("f", "f4"), ("d", "f8"), ("g", "f8"), ("B", "f4"), ("i", "f4"), (">f4", "f4")],
)
def test_inputs_are_floats_at_least_as_wide_as_given(dtype: str, expected: str) -> None:
    source = np.array([[1, 2], [3, 100]], dtype)
    result = Examples.from_arrays(source, [0, 1]).inputs.numpy()
    assert result.dtype == expected
    np.testing.assert_array_equal(result, source.astype(expected))


@pytest.mark.parametrize("dtype", ["b", "B", "h", "i", "q", "Q"])
def test_tokens_stay_integers(dtype: str) -> None:
    source = np.array([[1, 2], [3, 100]], dtype)
    result = Examples.from_arrays(source, [0, 1], tokens=True)
    assert result.inputs.dtype == torch.int64
    assert result.inputs.tolist() == source.tolist()
    assert result.to(torch.float64).inputs.dtype == torch.int64
    assert Examples.from_arrays(source, [0, 1]).inputs.dtype == torch.float32  # control


def test_a_token_that_no_float32_holds_is_kept() -> None:
    large = 2**24 + 1
    assert Examples.from_arrays([[large]], [0], tokens=True).inputs.tolist() == [[large]]
    assert Examples.from_arrays([[large]], [0]).inputs.tolist() == [[2**24]]  # control


def test_tokens_that_are_no_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"inputs are float64. Token ids must"):
        Examples.from_arrays([[1.0, 2.0]], [0], tokens=True)
    with pytest.raises(DataError, match=r"inputs are below 0. Token ids must"):
        Examples.from_arrays([[1, -1]], [0], tokens=True)


def test_tensors_and_lists_are_arrays_too() -> None:
    for source in (torch.ones(2, 3, requires_grad=True), [[1, 1, 1]] * 2, np.ones((2, 3))):
        assert Examples.from_arrays(source, (0, 1)).inputs.tolist() == [[1.0] * 3] * 2


def test_examples_are_copies_that_the_caller_cannot_change() -> None:
    source = np.ones((2, 3), np.float32)
    result = Examples.from_arrays(source, [0, 1])
    source[:] = 7
    assert result.inputs.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.ones((2, 3)), [0], "2 inputs and 1 targets. There must be one target for each input"),
        (np.ones((0, 3)), [], "The data set is empty"),
        (
            3.0,
            [0],
            r"inputs are float64 of shape \(\). They must be numbers with the examples first",
        ),
        (np.ones((1, 3)), ["a"], r"targets are <U1 of shape \(1,\).* numpy.unique"),
        ([[1, 2], [3]], [0, 1], r"inputs cannot become one array: .*inhomogeneous"),
        (np.ones(1, complex), [0], "inputs are complex128"),
        (np.array([None]), [0], "inputs are object"),
        ([[1.0], [np.nan], [np.inf]], [0, 1, 2], r"inputs hold nan in example 1.* there are 2"),
        ([[1.0], [2.0]], [0.0, np.inf], r"targets hold inf in example 1.* there are 1"),
    ],
)
def test_what_are_no_examples_is_refused(inputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Examples.from_arrays(inputs, targets)


def test_floats_are_cast_and_classes_are_not() -> None:
    examples = Examples.from_arrays([[0.1], [0.2]], [0, 1]).to(torch.float32)
    assert (examples.inputs.dtype, examples.targets.dtype) == (torch.float32, torch.int64)
    assert Examples.from_arrays([[1.0]], [0.5]).to(torch.float32).targets.dtype == torch.float32
    with pytest.raises(DataError, match=r"inputs hold 1e\+39 in example 1. torch.float32"):
        Examples.from_arrays([[0.1], [1e39]], [0, 1]).to(torch.float32)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 3]), "The label of example 1 is 3. Labels must be 0 to 2"),
        (torch.tensor([-1, 0]), "The label of example 0 is -1. Labels must be 0 to 2"),
        (torch.tensor([0.0, 1.0]), r"Class labels are float32 .* integers of shape \(2,\)"),
        (torch.tensor([[0], [1]]), r"are int64 of shape \(2, 1\).* argmax"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets: torch.Tensor, message: str) -> None:
    assert check_classes(torch.tensor([0, 2]), 3).tolist() == [0, 2]  # control
    with pytest.raises(DataError, match=message):
        check_classes(targets, 3)


def test_the_digits_are_those_of_scikit_learn() -> None:
    images, classes = datasets.load_digits(return_X_y=True)
    result = load_digits()
    np.testing.assert_array_equal(result.inputs.numpy().reshape(-1, 64) * 16, images)
    np.testing.assert_array_equal(result.targets.numpy(), classes)


def test_arrays_are_read_by_name(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.eye(3), y=np.arange(3), other=np.zeros(7))
    result = load_npz(str(tmp_path / "a.npz"), inputs="x", targets="y")
    assert result.inputs.tolist() == np.eye(3).tolist()
    with pytest.raises(DataError, match=r"no array 'inputs'. It has \['other', 'x', 'y'\].*inputs"):
        load_npz(str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match=r"no array 'z'.*data.args.targets"):
        load_npz(str(tmp_path / "a.npz"), inputs="x", targets="z")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_of_an_npz_file_is_read_right_or_refused(tmp_path: Path, save: Any) -> None:
    file, inputs, targets = tmp_path / "a.npz", np.arange(6.0).reshape(3, 2), np.arange(3)
    save(file, inputs=inputs, targets=targets)
    whole = file.read_bytes()
    num_refused = 0
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 0x41
        file.write_bytes(flipped)
        try:
            result = load_npz(str(file))
        except DataError:
            num_refused += 1
        else:  # a date or the like
            assert result.inputs.tolist() == inputs.tolist()
            assert result.targets.tolist() == targets.tolist()
    assert num_refused > len(whole) / 10


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_npz_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"no readable .npz file|has no array"):
        load_npz(str(tmp_path / "a.npz"))


def test_one_array_is_no_archive_and_a_folder_is_no_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"no readable .npz file of plain arrays"):
        load_npz(str(tmp_path / "a.npy"))
    with pytest.raises(DataError, match=r"is no file. Name a .npz file"):
        load_npz(str(tmp_path))
