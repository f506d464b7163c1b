"""This process: its threads and memory, its imports, and its parent.

A step on CPU allocates and frees gigabytes of activations. By default glibc maps each large block from the
kernel and returns it when it is freed, so that every step faults its pages in again, 4 KiB at a time. Without
`mmap` for large blocks and without trimming, the second step reuses the pages of the first; with pages of 2 MiB
the processor finds them faster. Together this saves a fifth of a step's time at SDXL's size. Sources:
mallopt(3), madvise(2). DREAMBOOTH_KEEP_MEMORY=0 in the environment leaves malloc unchanged.
"""

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KEEP_MEMORY",
    "avoid_fragmentation",
    "give_freed_memory_back",
    "keep_freed_memory",
    "page_out",
    "peak_memory_gib",
    "share_heaps",
    "uncollected",
    "when_orphaned",
]

# From <malloc.h> and <sys/mman.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MADV_HUGEPAGE, MADV_PAGEOUT = 14, 21

KEEP_MEMORY = "DREAMBOOTH_KEEP_MEMORY"
"""Environment variable; 0 turns `keep_freed_memory` off."""


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, for allocations from now on.

    Returns False without glibc, or if KEEP_MEMORY is 0; neither is an error.
    """
    if not sys.platform.startswith("linux") or os.environ.get(KEEP_MEMORY) == "0":
        return False
    try:
        libc = ctypes.CDLL(None)
        kept = bool(libc.mallopt(M_TRIM_THRESHOLD, -1)) and bool(libc.mallopt(M_MMAP_MAX, 0))
    except (AttributeError, OSError):
        return False
    if kept:
        ask_for_huge_pages(libc)
    return kept


def give_freed_memory_back() -> None:
    """Return memory freed so far to the system, even after `keep_freed_memory`: the next phase of a run needs
    less. malloc_trim(3); without glibc nothing happens."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def page_out(tensor: "Tensor") -> None:
    """Let a host tensor's pages leave memory until they are read again: those of a mapped file are then read
    from it, others need swap. madvise(2), Linux since 5.4; nothing happens elsewhere."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page, start = os.sysconf("SC_PAGE_SIZE"), tensor.data_ptr()
    first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_PAGEOUT)


def share_heaps(most: int = 1) -> bool:
    """Let all threads of this process allocate from at most `most` of glibc's arenas. For a server; call it before
    there are threads.

    By default each new thread may begin an arena of its own, 8 per processor, and what its pictures leave there
    (tens of MiB) serves no thread of another arena. mallopt(3); False where there is no glibc to ask.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, most))
    except (AttributeError, OSError):
        return False


def ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap by three quarters of the machine's memory, untouched, ask for huge pages there, and free it again.

    This reserves only addresses, since untouched memory is not taken. As the heap is no longer trimmed, later
    allocations come from this range. If the kernel refuses, nothing changes.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 4 * 3
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if block:
        start = -(-block // page) * page
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size - page), MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def peak_memory_gib() -> float | None:
    """The largest resident set of this process so far, GiB; None on systems that do not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def reset_peak_memory() -> bool:
    """Restart `peak_memory_gib` from what is resident now; False on systems that cannot (proc(5), clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def avoid_fragmentation() -> None:
    """Let PyTorch grow its blocks of GPU memory, so that pictures between two steps leave no holes. Call it before
    importing torch.

    The user's own settings, under the new or the old name, are kept.
    """
    if sys.platform.startswith("linux") and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def uncollected() -> Iterator[None]:
    """For large imports: the garbage collector pauses and never examines the new objects.

    Among half a million objects of PyTorch and diffusers it finds nothing, and takes a sixth of their import
    time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def when_orphaned(parent: int, then: Callable[[], object]) -> None:
    """Call `then` in a thread as soon as the parent process `parent` has ended."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        then()

    Thread(target=wait, daemon=True).start()
