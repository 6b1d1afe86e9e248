"""Signals from inside an update that it must be computed again, in another way.

Nothing has been committed when one is raised. The next attempt takes account of it.
"""

__all__ = ["Again", "Drew", "InPortions", "NeedsGraph"]


class Again(Exception):
    """Signals that the update must be computed again."""


class Drew(Again):
    """Signals that a part drew random numbers that no key governs."""


class InPortions(Again):
    """Signals that a gradient arrived after its bucket was sent."""


class NeedsGraph(Again):
    """Signals that a forward pass without a graph failed: the losses may contain derivatives."""
