"""This process: its threads, memory and imports. The process that trains: how it is started, and why it ended.

A step on CPU allocates and frees gigabytes of activations. By default glibc maps each large block from the kernel and
returns it when it is freed, so that every step faults its pages in again, 4 KiB at a time. Reusing them, in pages of 2
MiB, saves a fifth of a step's time at SDXL's size. Sources: mallopt(3), madvise(2).
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core import import_environment

if TYPE_CHECKING:
    from torch import Tensor

# From <malloc.h> and <sys/mman.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MADV_HUGEPAGE, MADV_PAGEOUT = 14, 21

KEEP_MEMORY = "DREAMBOOTH_KEEP_MEMORY"  # Environment variable; 0 turns `keep_freed_memory` off.


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on; False without glibc, or if KEEP_MEMORY is 0."""
    if not sys.platform.startswith("linux") or os.environ.get(KEEP_MEMORY) == "0":
        return False
    try:
        libc = ctypes.CDLL(None)
        kept = bool(libc.mallopt(M_TRIM_THRESHOLD, -1)) and bool(libc.mallopt(M_MMAP_MAX, 0))
    except (AttributeError, OSError):
        return False
    if kept:
        # Grow the heap by three quarters of the machine's memory, untouched and so not taken, ask for huge pages there,
        # and free it again: it is no longer trimmed, so later allocations come from this range.
        page = os.sysconf("SC_PAGE_SIZE")
        size = os.sysconf("SC_PHYS_PAGES") * page // 4 * 3
        libc.malloc.restype = ctypes.c_void_p
        if block := libc.malloc(ctypes.c_size_t(size)):
            start = -(-block // page) * page
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size - page), MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(block))
    return kept


def give_freed_memory_back() -> None:
    """Return freed memory to the system for a smaller phase, by malloc_trim(3); nothing without glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def page_out(tensor: "Tensor") -> None:
    """Let a host tensor's pages leave memory until they are read again, by madvise(2); only Linux since 5.4."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page, start = os.sysconf("SC_PAGE_SIZE"), tensor.data_ptr()
    first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_PAGEOUT)


def share_heaps() -> bool:
    """Let all threads share one of glibc's arenas: for a server, before there are threads. Each thread may else begin
    its own, and what it leaves there (tens of MiB) serves no other. mallopt(3); False without glibc."""
    try:
        return sys.platform.startswith("linux") and bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))
    except (AttributeError, OSError):
        return False


def peak_memory_gib() -> float | None:
    """The largest resident set of this process so far, GiB; None on systems that do not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def reset_peak_memory() -> None:
    """Restart `peak_memory_gib` from what is resident now, on systems that can (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def avoid_fragmentation() -> None:
    """Let PyTorch grow its blocks of GPU memory; before it is imported, and unless the user chose."""
    if sys.platform.startswith("linux") and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def uncollected() -> Iterator[None]:
    """For large imports: the garbage collector, a sixth of their time, pauses and never examines the objects."""
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


def was_killed(code: int | None, log_tail: str) -> bool:
    """Whether a signal ended a process that recorded no end; without an exit status, its log decides."""
    return code < 0 if code is not None else "rror" not in _last_words(log_tail)


def why_it_ended(code: int | None, log_tail: str, *, was_asked: bool) -> str:
    """The reason, for a process that recorded no end. `code` is None if an earlier server had started it."""
    words = _last_words(log_tail)
    if code == -signal.SIGTERM and was_asked:
        return "It was stopped before training had begun."
    is_memory = not was_asked and code in (None, -signal.SIGKILL)
    cause = ", perhaps for want of memory" if is_memory else ""
    if code is not None and code < 0:
        return f"The process was killed by {signal.Signals(-code).name}{cause}."
    if code is None and was_killed(code, log_tail):
        return f"The process was killed{cause}; its last words: {words or 'none'}"
    return words or "The process ended without a word."


def _last_words(log_tail: str) -> str:
    """The last line of the log that is not a progress bar."""
    lines = [line for line in log_tail.splitlines() if line.strip() and "%|" not in line]
    return lines[-1][:300] if lines else ""


CONFIG_NAME, LOG_NAME = "job_config.json", "job.log"  # Of a run: its settings, and the terminal's output
TRAIN = ("-P", "-m", "dreambooth_moslora", "train")  # -P: no `torch.py` of the current folder is imported
LOG_TAIL_LINES, TAIL_BYTES = 40, 64 * 1024


def write_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    (run_dir / CONFIG_NAME).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def start_logged(
    run_dir: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    inherits: Sequence[int] = (),
) -> subprocess.Popen:
    """Start Python with the arguments in `folder` (None: the current one), its output to the log in `run_dir`, in a
    session of its own (no Ctrl-C). `environment` is added; open files in `inherits` are passed on."""
    own = {"PYTHONUNBUFFERED": "1", **import_environment(), **(environment or {})}
    with (run_dir / LOG_NAME).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            cwd=folder,
            start_new_session=True,
            pass_fds=inherits,
        )


def log_tail(run_dir: Path) -> str:
    """The last lines of the log, with the last state of progress bars. Empty without a log."""
    try:
        with (run_dir / LOG_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    shown = [line for line in text.split("\n") if line.strip()]
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown[-LOG_TAIL_LINES:])
