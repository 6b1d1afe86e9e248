"""Tests of the diabetes data, standardised, with weights by sex.

Oracle: the copy of scikit-learn that is scaled already, each column's mean 0 and its sum of squares
1, so that it is ours over sqrt(442); and counting by hand.
"""

import sys

import numpy as np
import pytest
from sklearn import datasets

from anybatch.data.scikit_learn import load_diabetes
from anybatch.errors import DataError


def test_measurements_and_targets_are_standardised() -> None:
    examples = load_diabetes()
    assert examples.weights is None
    scaled = datasets.load_diabetes()
    np.testing.assert_allclose(  # float64; the file of the copy has 15 digits
        examples.inputs.numpy() / np.sqrt(442), scaled.data, rtol=0, atol=1e-10
    )
    assert examples.targets.mean().abs() < 1e-12  # what predicts the mean has an error of 1
    assert abs(examples.targets.square().mean() - 1) < 1e-12
    order = np.argsort(scaled.target, kind="stable")
    assert (np.diff(examples.targets.numpy()[order]) >= 0).all()


def test_with_weights_both_sexes_count_the_same() -> None:
    examples = load_diabetes(weights="sex")
    assert examples.weights is not None
    sex = datasets.load_diabetes(scaled=False).data[:, 1]
    sums = [examples.weights.numpy()[sex == code].sum() for code in (1, 2)]
    np.testing.assert_allclose(sums, [221, 221], rtol=1e-12)
    assert [int((sex == code).sum()) for code in (1, 2)] == [235, 207]  # control: without, not


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"weights = 'age'. It must be 'sex', or left out"):
        load_diabetes(weights="age")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        DataError, match=r"cannot be imported.* Install it: pip install 'anybatch\[demo"
    ):
        load_diabetes()
