"""The rules for SGD again, from a quarter of the tuned rate.

A rate tuned at a small batch is near the largest at which training is stable, where a multiple of
it is not: the linear rule supposes that the updates it joins would hardly change the gradient.
"""

from collections.abc import Mapping
from typing import Any

import scaling_rules_batches
from scaling_rules_batches import run

__all__ = ["SHARE", "jobs", "run"]

SHARE = 0.25  # of the tuned rate


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the tuned rate, at the smaller one."""
    tuned = [job for job in scaling_rules_batches.jobs(raw) if job["optimizer"] == "sgd"]
    return [job | {"lr": job["lr"] * SHARE} for job in tuned]
