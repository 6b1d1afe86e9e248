"""Property tests: how many examples each tier tries, always the same ones."""

from hypothesis import settings

__all__ = ["seeded_examples"]


def seeded_examples(number: int) -> settings:
    """Return settings for so many examples in the full tier, and for a share in the fast one.

    The share is that of the profile which conftest.py registers: 100 of 100, or 15.
    """
    share = settings.default.max_examples / 100
    return settings(derandomize=True, deadline=None, max_examples=max(2, round(number * share)))
