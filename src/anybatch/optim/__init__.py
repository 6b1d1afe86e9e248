"""Optimisers: their rates and state, averages of weights, the loss scale."""

from anybatch.optim.adascale import AdaScale
from anybatch.optim.averages import Average
from anybatch.optim.loss_scale import LossScale

__all__ = ["AdaScale", "Average", "LossScale"]
