"""Memory that the C library keeps: where it is asked to, and nothing where it cannot be."""

import ctypes
import platform
import subprocess
import sys

import pytest
from running import ROOT

from wide.training import memory

# Page faults of writing to a large tensor that is made anew twenty times.
FAULTS = """
import resource, torch
from wide.training.memory import keep_memory
def faults():
    for _ in range(20):  # until the heap is as large as it gets
        torch.ones(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
as_it_is = faults()
assert keep_memory()
print(as_it_is, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    as_it_is, kept = map(int, done.stdout.split())
    assert kept < as_it_is / 10


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("nothing to load there"))
    assert not memory.keep_memory()


def test_another_c_library(monkeypatch):
    class Musl:
        def mallopt(self, parameter, value):
            pytest.fail("another library's mallopt")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Musl())
    assert not memory.keep_memory()
