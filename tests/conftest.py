"""Tests run on one thread a process, so that they take the same time on a busy machine."""

import torch

torch.set_num_threads(1)
