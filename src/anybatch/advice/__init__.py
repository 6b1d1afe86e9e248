"""Advice by measurement: which batch size, and which of several recipes."""
