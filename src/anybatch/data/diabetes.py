"""The diabetes data that scikit-learn ships: 442 patients, ten measurements, one target.

    x <- (x - mean) / sd,    y <- (y - mean) / sd,    over all 442

so that the mean squared error of whoever predicts the mean is 1, and 1 - error is R^2.
"""

import numpy as np

from anybatch.data.arrays import Examples
from anybatch.errors import DataError
from anybatch.extras import import_extra

__all__ = ["load_diabetes"]


def load_diabetes(weights: str | None = None) -> Examples:
    """Measurements [442, 10] and the progression of the disease after a year [442], standardised.

    Args:
        weights: "sex" for sample weights N / (2 n_s), n_s the number of the patient's sex, so that
            both sexes count the same (235 and 207 of them); None: each patient counts 1.

    Raises:
        DataError: scikit-learn cannot be imported.

    Source: Efron, Hastie, Johnstone and Tibshirani 2004, Least Angle Regression, Annals of
        Statistics 32; the copy in scikit-learn.
    """
    if weights not in (None, "sex"):
        raise DataError(f"data.args.weights = {weights!r}, expected 'sex', or no such key.")
    whose = "the diabetes data come with scikit-learn"
    datasets = import_extra("sklearn.datasets", "anybatch[demo]", whose, DataError)
    found = datasets.load_diabetes(scaled=False)
    _, sex, sizes = np.unique(found.data[:, 1], return_inverse=True, return_counts=True)
    return Examples.of(
        _standardised(found.data),
        _standardised(found.target),
        None if weights is None else len(sex) / (len(sizes) * sizes[sex]),
    )


def _standardised(values: np.ndarray) -> np.ndarray:
    standardised: np.ndarray = (values - values.mean(0)) / values.std(0)
    return standardised
