"""What the tests share.

They run tiny networks, which more threads only slow down, in this process and in the scripts it starts.
"""

import os

import pytest
import torch
from small_data import made_up, write_kmnist

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture
def seeded():
    """torch's random numbers start anew, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kmnist(tmp_path_factory):
    """A data folder with a small KMNIST of random images: 200 training, 100 validation, 60 test."""
    folder = tmp_path_factory.mktemp("data")
    write_kmnist(folder, *made_up(300, (28, 28), seed=1), *made_up(60, (28, 28), seed=2))
    return folder
