"""How the C library hands out memory: kept by this process between steps, where that can be asked for."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
HEAP_PAD = 2**28  # bytes that the heap grows by at a time: a step's tensors in few calls of the system
THRESHOLDS = (2**30, 2**25)  # bytes; a glibc that refuses the first takes the second, its limit


def keep_memory() -> bool:
    """Have the C library keep the memory of freed tensors for the next ones, for the life of this process.

    By default glibc gets every large tensor from the operating system and gives it back, so that each step pays for
    clearing the same pages anew. To be called before the first large tensor. The memory that a process holds then
    stays at its highest. (glibc manual, "Malloc Tunable Parameters"; mallopt(3).)

    Returns:
        Whether it was done: False, and nothing changes, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library, whose mallopt would mean something else
        return False
    return (
        any(library.mallopt(M_MMAP_THRESHOLD, threshold) for threshold in THRESHOLDS)
        and bool(library.mallopt(M_TRIM_THRESHOLD, -1))  # never
        and bool(library.mallopt(M_TOP_PAD, HEAP_PAD))
    )
