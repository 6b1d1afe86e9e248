"""anybatch: one exact weight update from any batch."""

__version__ = "0.1.0"
