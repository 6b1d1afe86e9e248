"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8, ten classes."""

import numpy as np

from anybatch.data.arrays import Examples
from anybatch.errors import DataError

__all__ = ["load_digits"]


def load_digits() -> Examples:
    """Images [1797, 1, 8, 8] scaled to 0 .. 1, and their classes.

    Raises:
        DataError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI); the copy
        in scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed. "
            "Install it: pip install 'anybatch[demo]'."
        ) from error
    images, classes = datasets.load_digits(return_X_y=True)
    return Examples.of(images.astype(np.float32).reshape(-1, 1, 8, 8) / 16, classes)
