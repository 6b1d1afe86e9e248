"""Tests run on one thread a process, so that they take the same time on a busy machine; and Ctrl-C
interrupts, also where they were started in the background, in which a shell has it ignored."""

import signal

import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
