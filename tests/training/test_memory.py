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
import resource, sys, torch
from wide.training.memory import keep_memory
if sys.argv[1] == "kept":
    assert keep_memory()
for _ in range(20):  # until the heap is as large as it gets
    torch.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept):
    line = [sys.executable, "-c", FAULTS, kept]
    return int(subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_kept():
    assert faults("kept") < faults("as it is") / 10


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
