"""One thread for every test: on tensors this small, more threads cost more than they bring."""

import os

# For the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
