"""Tell glibc's malloc to keep the memory that a training step frees.

A step on CPU allocates and frees gigabytes of activations. By default glibc maps each large block from the kernel and
gives it back when it is freed, so that every step faults its pages in again: in a step of SDXL that is 10–15 % of the
time. With no `mmap` for large blocks and no trimming, the second step finds the first one's pages still mapped.
Source: mallopt(3). The peak is the same; what is kept is what the next step needs.
"""

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "peak_memory_gib"]

# From <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Set it for this process, for allocations from now on; False where there is no glibc to ask (not an error).

    Also asks torch for transparent huge pages, which works only before torch's first allocation.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, -1)) and bool(mallopt(M_MMAP_MAX, 0))


def peak_memory_gib() -> float | None:
    """The largest resident set of this process so far, GiB; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
