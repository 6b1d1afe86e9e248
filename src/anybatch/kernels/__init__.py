"""Kernels chosen by measurement, for users who ask for them.

By default an update uses torch's own kernels, measures nothing and writes no file.
"""

from anybatch.kernels.choice import use

__all__ = ["use"]
