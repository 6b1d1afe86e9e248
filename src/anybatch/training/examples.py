"""The examples that drive a run, from its ledger.

    norm, loss, share    means over the visits of an example
    forgetting           how often it was right at one visit and wrong at the next

Source of forgetting: Toneva et al. 2019, 1812.05159, definition 2.1.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anybatch.errors import RunError

__all__ = ["By", "ranked"]

By = Literal["norm", "loss", "share", "forgetting"]

_KEY = {"norm": "observe.norms", "share": "observe.share", "loss": "observe.norms"}
_SOURCE = {"norm": "norm", "loss": "loss", "share": "share", "forgetting": "accuracy"}


def ranked(columns: Mapping[str, NDArray[Any]], by: By, top: int) -> list[dict[str, Any]]:
    """The examples with the largest value, a row each: id, visits and what is known of them.

    Args:
        columns: of the ledger, one row a visit, in the order of the updates.
        by: which value.
        top: how many at most.

    Raises:
        RunError: a ledger without that value.
    """
    if _SOURCE[by] not in columns:
        needed = "a loss that has the metric accuracy" if by == "forgetting" else f"{_KEY[by]}=true"
        raise RunError(
            f"the ledger cannot tell {by!r}, expected {_SOURCE[by]!r} among {', '.join(columns)}. "
            f"Train with {needed}."
        )
    ids, place, visits = np.unique(columns["example"], return_inverse=True, return_counts=True)
    values: dict[str, NDArray[Any]] = {"visits": visits}
    for name in ("loss", "norm", "share", "accuracy"):
        if name in columns:
            values[name] = np.bincount(place, columns[name]) / visits
    if "accuracy" in columns:
        values["forgetting"] = _forgotten(place, columns["accuracy"] > 0.5, len(ids))
    order = np.argsort(-values[by], kind="stable")[:top]
    return [
        {"example": int(ids[i])} | {name: column[i].item() for name, column in values.items()}
        for i in order
    ]


def _forgotten(
    place: NDArray[np.int64], is_right: NDArray[np.bool_], num_examples: int
) -> NDArray[np.int64]:
    """How often each example goes from right to wrong."""
    order = np.argsort(place, kind="stable")  # visits of one example side by side, in time
    of, right = place[order], is_right[order]
    lost = (of[1:] == of[:-1]) & right[:-1] & ~right[1:]
    return np.bincount(of[1:][lost], minlength=num_examples)
