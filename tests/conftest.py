"""Tests run on one thread a process, so that they take the same time on a busy machine, and by
torch's own kernels, so that no measurement chooses; and Ctrl-C interrupts, also where they were
started in the background, in which a shell has it ignored."""

import os
import signal

import torch

torch.set_num_threads(1)
os.environ.setdefault("ANYBATCH_KERNELS", "torch")
signal.signal(signal.SIGINT, signal.default_int_handler)
