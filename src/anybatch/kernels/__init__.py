"""Kernels that are chosen by measurement, for those who ask for them.

A plain update uses torch's own kernels, measures nothing and writes no file.
"""

from anybatch.kernels.choice import use

__all__ = ["use"]
