"""Tests run tiny networks, which more threads only slow down, in this process and in the scripts it starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
