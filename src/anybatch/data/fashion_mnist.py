"""Fashion-MNIST: 60,000 + 10,000 images of clothes, 28x28, ten classes, as Debian packs them."""

from pathlib import Path

import torch

from anybatch.data.arrays import Examples
from anybatch.data.idx import load_idx
from anybatch.errors import DataError

__all__ = ["load_fashion_mnist"]

DEBIAN = "/usr/share/datasets/fashion-mnist"
FILES = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


def load_fashion_mnist(part: str = "train", folder: str = DEBIAN) -> Examples:
    """Images [N, 1, 28, 28] scaled to 0 .. 1, and their classes.

    Args:
        part: "train" (N = 60,000), "test" (10,000) or "all" (both, in this order).
        folder: of the four gzipped IDX files.

    Raises:
        DataError: another part, or files that are missing or damaged.

    Source: Xiao, Rasul and Vollgraf 2017, 1708.07747; Debian's package dataset-fashion-mnist.
    """
    if part not in FILES:
        raise DataError(f"data.args.part = {part!r}, expected one of {', '.join(FILES)}.")
    loaded = []
    for name in FILES[part]:
        images = Path(folder, f"{name}-images-idx3-ubyte.gz")
        labels = Path(folder, f"{name}-labels-idx1-ubyte.gz")
        for file in (images, labels):
            if not file.is_file():
                raise DataError(
                    f"{file} is not there, expected the files of Debian's package "
                    f"dataset-fashion-mnist. Install it (apt install dataset-fashion-mnist), or "
                    f"name the folder that holds them: data.args.folder = '...'."
                )
        loaded.append(load_idx(str(images), str(labels)))
    if len(loaded) == 1:
        return loaded[0]
    return Examples(*(torch.cat(both) for both in zip(*(x.columns for x in loaded), strict=True)))
