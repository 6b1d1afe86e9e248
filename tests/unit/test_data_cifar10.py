"""Tests of CIFAR-10 in its binary version.

Oracle: rows written byte by byte from a formula for the pixel of (image, colour, y, x).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data import load_cifar10
from anybatch.errors import DataError
from properties import seeded_examples


def pixel(image: int, colour: int, y: int, x: int) -> int:
    """Some byte, another one in any direction."""
    return (image * 101 + colour * 59 + y * 7 + x * 3) % 256


def batch(labels: list[int], planes_first: bool = True) -> bytes:
    """A file with these labels; pixels by colour, or (wrongly) the colours of a pixel together."""
    content = bytearray()
    for image, label in enumerate(labels):
        content.append(label)
        places = [(c, y, x) for c in range(3) for y in range(32) for x in range(32)]
        if not planes_first:
            places.sort(key=lambda place: place[1:])
        content += bytes(pixel(image, *place) for place in places)
    return bytes(content)


def right(inputs: torch.Tensor) -> bool:
    """Return whether every pixel is at the place of the formula."""
    images, colours, ys, xs = np.indices(tuple(inputs.shape))
    expected = (images * 101 + colours * 59 + ys * 7 + xs * 3) % 256 / np.float32(255)
    return bool(np.abs(inputs.numpy() - expected).max() <= 6e-8)  # one rounding to float32


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
@seeded_examples(15)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, labels: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    (folder / "data_batch_1.bin").write_bytes(batch(labels))
    examples = load_cifar10(str(folder))
    assert examples.targets.tolist() == labels
    assert examples.inputs.shape == (len(labels), 3, 32, 32)
    assert right(examples.inputs)


def test_the_colours_of_a_pixel_together_are_another_picture(tmp_path: Path) -> None:  # control
    (tmp_path / "data_batch_1.bin").write_bytes(batch([3, 4], planes_first=False))
    assert not right(load_cifar10(str(tmp_path)).inputs)


def test_batches_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(batch([number % 10]))
    (tmp_path / "test_batch.bin").write_bytes(batch([5, 5]))
    expected = {"train": [1, 2, 0], "test": [5, 5], "all": [1, 2, 0, 5, 5]}
    for part, labels in expected.items():
        assert load_cifar10(str(tmp_path), part).targets.tolist() == labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (batch([1, 2])[:-1], "holds 6145 bytes. It must hold a multiple of 3073.* cut off"),
        (b"", "holds 0 bytes. It must hold a multiple of 3073"),
        (batch([1, 2, 10]), "the label of row 2 is 10. Labels are 0 to 9"),
    ],
)
def test_what_is_no_batch_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_cifar10(str(tmp_path))


def test_another_folder_and_another_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no data_batch_\*.bin. .* Python or Matlab"):
        load_cifar10(str(tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(batch([1]))
    with pytest.raises(DataError, match=r"has no test_batch.bin"):
        load_cifar10(str(tmp_path), "all")
    with pytest.raises(DataError, match=r"part = 'valid'. It must be one of train, test, all"):
        load_cifar10(str(tmp_path), "valid")
