"""IDX files, and Fashion-MNIST in them.

Oracle: a writer of the format in the standard library's struct, value by value.
"""

import gzip
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data import load_fashion_mnist, load_idx
from anybatch.data.idx import DEBIAN, read_idx
from anybatch.errors import DataError
from properties import seeded_examples

CODES = {8: "B", 9: "b", 11: "h", 12: "i", 13: "f", 14: "d"}  # of the type byte, in struct
SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=4)
installed = pytest.mark.skipif(
    not Path(DEBIAN).is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def idx(kind: int, sizes: list[int], values: list[Any], endian: str = ">") -> bytes:
    """An IDX file."""
    header = struct.pack(f">2x2B{len(sizes)}I", kind, len(sizes), *sizes)
    return header + struct.pack(f"{endian}{len(values)}{CODES[kind]}", *values)


def pair(folder: Path, images: bytes, labels: bytes) -> dict[str, str]:
    """Arguments of two files with these contents."""
    for name, content in (("images", images), ("labels", labels)):
        (folder / name).write_bytes(content)
    return {"images": str(folder / "images"), "labels": str(folder / "labels")}


IMAGES = idx(8, [2, 2, 3], [0, 51, 102, 153, 204, 255, 5, 4, 3, 2, 1, 0])
LABELS = idx(8, [2], [7, 0])


@given(data=st.data(), kind=st.sampled_from(sorted(CODES)), sizes=SIZES, packed=st.booleans())
@seeded_examples(60)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: int, sizes: list[int], packed: bool
) -> None:
    width = 8 * struct.calcsize(CODES[kind])
    low, high = (0, 255) if kind == 8 else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    count = int(np.prod(sizes))
    number = st.integers(low, high) if kind < 13 else st.floats(width=width, allow_nan=False)
    values = data.draw(st.lists(number, min_size=count, max_size=count))
    content = idx(kind, sizes, values)
    file = tmp_path_factory.mktemp("idx") / "array"
    file.write_bytes(gzip.compress(content) if packed else content)
    examples = read_idx(str(file))
    assert examples.shape == tuple(sizes)
    places = itertools.product(*map(range, sizes))  # row-major: the last index runs fastest
    assert [examples[place] for place in places] == values


def test_the_wrong_end_first_is_another_file(tmp_path: Path) -> None:  # the control
    (tmp_path / "array").write_bytes(idx(11, [2], [1, 2], endian="<"))
    assert read_idx(str(tmp_path / "array")).tolist() == [256, 512]


def test_images_have_a_channel_and_bytes_become_0_to_1(tmp_path: Path) -> None:
    examples = load_idx(**pair(tmp_path, gzip.compress(IMAGES), LABELS))
    assert examples.inputs.shape == (2, 1, 2, 3)
    expected = np.array([[0, 51, 102], [153, 204, 255]], np.float32) / np.float32(255)
    np.testing.assert_array_equal(examples.inputs[0, 0].numpy(), expected)
    assert examples.targets.tolist() == [7, 0]
    assert examples.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("kind", "scale", "dtype", "expected"),
    [
        (8, {"scale": 1}, torch.float32, 40),
        (11, {"scale": 80}, torch.float32, 0.5),
        (12, {"scale": 80}, torch.float64, 0.5),
        (13, {}, torch.float32, 40),
        (14, {"scale": 10.0}, torch.float64, 4),
    ],
)
def test_pixels_are_divided_by_the_scale(
    tmp_path: Path, kind: int, scale: dict[str, float], dtype: torch.dtype, expected: float
) -> None:
    examples = load_idx(**pair(tmp_path, idx(kind, [1, 1, 1], [40]), idx(8, [1], [3])), **scale)
    assert examples.inputs.dtype == dtype
    assert examples.inputs.item() == expected


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:-1], LABELS, r"27 bytes. It should hold 28 for its sizes \(2, 2, 3\).* cut off"),
        (IMAGES + b"\0", LABELS, "29 bytes. It should hold 28 .* followed by others"),
        (IMAGES[:7], LABELS, "7 bytes. The header alone has 16 for its 3 dim"),
        (b"\x01" + IMAGES[1:], LABELS, "begins with the bytes 01 00 08 03. An IDX file"),
        (b"\0\0\x0a" + IMAGES[3:], LABELS, "begins with the bytes 00 00 0a 03"),
        (b"\0\0", LABELS, "begins with the bytes 00 00. An IDX file"),
        (b"", LABELS, r"begins with the bytes \(none\). An IDX file"),
        (gzip.compress(IMAGES, mtime=0)[:-4], LABELS, "gzip file that cannot be unpacked"),
        (gzip.compress(IMAGES, mtime=0) + b"more", LABELS, "gzip file that cannot be unpacked"),
        (LABELS, IMAGES, r"images holds uint8 of sizes \(2,\). It must hold .* 3 dim.* exchanged"),
        (IMAGES, IMAGES, r"labels holds uint8 of sizes \(2, 2, 3\). It must hold labels"),
        (IMAGES, idx(13, [2], [0, 1]), "labels holds float32 .* It must hold labels: integers"),
        (IMAGES, idx(8, [3], [0, 1, 2]), "images holds 2 images and .*labels 3 labels"),
        (idx(11, [2, 1, 1], [0, 1]), LABELS, "holds int16 pixels.* data.args.scale"),
    ],
)
def test_what_are_no_images_and_labels_is_refused(
    tmp_path: Path, images: bytes, labels: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_idx(**pair(tmp_path, images, labels))


def test_every_flipped_byte_of_a_header_is_refused(tmp_path: Path) -> None:
    for place in range(16):
        flipped = bytearray(IMAGES)
        flipped[place] ^= 0x41
        with pytest.raises(
            DataError, match=r"An IDX file begins|It should hold|It must hold|The header alone"
        ):
            load_idx(**pair(tmp_path, bytes(flipped), LABELS))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(DataError, match=r"data.args.scale = .* It must be a number above 0"):
        load_idx(**pair(tmp_path, IMAGES, LABELS), scale=scale)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    args = pair(tmp_path, IMAGES, LABELS)
    with pytest.raises(DataError, match=r"gone cannot be read \(No such file.*It should be an IDX"):
        load_idx(str(tmp_path / "gone"), args["labels"])
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        load_idx(args["images"], str(tmp_path))


@installed
@pytest.mark.parametrize(
    ("part", "name", "count"), [("train", "train", 60_000), ("test", "t10k", 10_000)]
)
def test_fashion_mnist_is_what_the_bytes_of_its_files_say(part: str, name: str, count: int) -> None:
    examples = load_fashion_mnist(part)
    assert examples.inputs.shape == (count, 1, 28, 28)
    assert torch.bincount(examples.targets).tolist() == [count // 10] * 10
    pixels = gzip.decompress(Path(DEBIAN, f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
    for image in (0, 1, count - 1):
        expected = [byte / 255 for byte in pixels[784 * image : 784 * (image + 1)]]
        # one rounding to float32: 2^-24 of a value up to 1
        np.testing.assert_allclose(examples.inputs[image].flatten(), expected, rtol=0, atol=6e-8)


def small_fashion_mnist(folder: Path) -> None:
    """Write the four files, with 2 images to train on and 1 to test on."""
    for name, images, labels in (
        ("train", IMAGES, LABELS),
        ("t10k", idx(8, [1, 2, 3], [255] * 6), idx(8, [1], [9])),
    ):
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_the_parts_of_fashion_mnist_are_its_files_in_order(tmp_path: Path) -> None:
    small_fashion_mnist(tmp_path)
    expected = {"train": [7, 0], "test": [9], "all": [7, 0, 9]}
    for part, classes in expected.items():
        examples = load_fashion_mnist(part, folder=str(tmp_path))
        assert examples.targets.tolist() == classes
        assert len(examples.inputs) == len(classes)


def test_fashion_mnist_that_is_not_there_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images.*apt install dataset-fashion-mnist"):
        load_fashion_mnist(folder=str(tmp_path))
    with pytest.raises(DataError, match=r"part = 'both'. It must be one of train, test, all"):
        load_fashion_mnist("both")
