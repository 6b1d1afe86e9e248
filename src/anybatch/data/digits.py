"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8, ten classes."""

import numpy as np

from anybatch.data.arrays import Examples
from anybatch.errors import DataError
from anybatch.extras import import_extra

__all__ = ["load_digits"]


def load_digits() -> Examples:
    """Images [1797, 1, 8, 8] scaled to 0 .. 1, and their classes.

    Raises:
        DataError: scikit-learn cannot be imported.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI); the copy
        in scikit-learn.
    """
    whose = "the digits come with scikit-learn"
    datasets = import_extra("sklearn.datasets", "anybatch[demo]", whose, DataError)
    images, classes = datasets.load_digits(return_X_y=True)
    return Examples.of(images.astype(np.float32).reshape(-1, 1, 8, 8) / 16, classes)
