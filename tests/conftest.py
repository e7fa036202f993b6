"""One thread for every process of the tests: their tensors are tiny, and threads would only wait for each other."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch, and for child processes
