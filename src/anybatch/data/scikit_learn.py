"""Data sets that scikit-learn ships: handwritten digits, and diabetes patients."""

from typing import Any

import numpy as np

from anybatch.data.arrays import Examples
from anybatch.errors import DataError
from anybatch.extras import import_extra

__all__ = ["load_diabetes", "load_digits"]


def load_digits() -> Examples:
    """Load 1,797 images [1797, 1, 8, 8] scaled to 0 .. 1, and their ten classes.

    Raises:
        DataError: scikit-learn cannot be imported.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI); the copy
        in scikit-learn.
    """
    datasets = _import_datasets("the digits come with scikit-learn")
    images, classes = datasets.load_digits(return_X_y=True)
    return Examples.from_arrays(images.astype(np.float32).reshape(-1, 1, 8, 8) / 16, classes)


def load_diabetes(weights: str | None = None) -> Examples:
    """Load ten measurements [442, 10] and the progression of the disease after a year [442].

        x <- (x - mean) / sd,    y <- (y - mean) / sd,    over all 442

    So predicting the mean has a mean squared error of 1, and 1 - error is R^2.

    Args:
        weights: "sex" for sample weights N / (2 n_s), n_s the number of patients of the patient's
            sex, so that both sexes count the same (235 and 207 patients); None: each counts 1.

    Raises:
        DataError: scikit-learn cannot be imported.

    Source: Efron, Hastie, Johnstone and Tibshirani 2004, Least Angle Regression, Annals of
        Statistics 32; the copy in scikit-learn.
    """
    if weights not in (None, "sex"):
        raise DataError(f"data.args.weights = {weights!r}. It must be 'sex', or left out.")
    datasets = _import_datasets("the diabetes data come with scikit-learn")
    patients = datasets.load_diabetes(scaled=False)
    _, sex, sizes = np.unique(patients.data[:, 1], return_inverse=True, return_counts=True)
    return Examples.from_arrays(
        _standardise(patients.data),
        _standardise(patients.target),
        None if weights is None else len(sex) / (len(sizes) * sizes[sex]),
    )


def _import_datasets(reason: str) -> Any:
    return import_extra("sklearn.datasets", "anybatch[demo]", reason, DataError)


def _standardise(values: np.ndarray) -> np.ndarray:
    standardised: np.ndarray = (values - values.mean(0)) / values.std(0)
    return standardised
