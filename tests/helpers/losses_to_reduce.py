"""Example losses to reduce: from plain lists, and drawn with ties, masks and fractional counts."""

import torch
from hypothesis import strategies as st

from anybatch.example_losses import ExampleLosses
from properties import seeded_examples

seeded = seeded_examples(150)


def losses_of(values, counts=None, dtype=torch.float64, groups=None):
    return ExampleLosses(
        torch.as_tensor(values, dtype=dtype),
        None if counts is None else torch.as_tensor(counts, dtype=dtype),
        None if groups is None else torch.as_tensor(groups),
    )


@st.composite
def batches(draw, dtype=torch.float64, unique=False):
    """Up to 40 examples; ties are frequent, some counts are 0, many are fractions."""
    grid = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0])
    values = st.floats(-50, 50, width=32) if unique else grid | st.floats(-50, 50, width=32)
    v = draw(st.lists(values, min_size=1, max_size=40, unique=unique))
    weight = st.sampled_from([1.0, 1.0, 0.25, 3.0, 7.5] if unique else [0.0, 1.0, 0.25, 3.0, 7.5])
    n = draw(st.none() | st.lists(weight, min_size=len(v), max_size=len(v)).filter(any))
    return losses_of(v, n, dtype)
