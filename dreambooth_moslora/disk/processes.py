"""Memory of this process, and the start and end of the processes that train.

A step on CPU allocates and frees gigabytes of activations. By default glibc maps each large block
from the kernel and returns it when it is freed, so that every step faults its pages in again, 4 KiB
at a time. Source: mallopt(3).
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from dreambooth_moslora.disk.paths import get_import_environment
from dreambooth_moslora.disk.run_folder import METRICS_NAME

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
"""Options of mallopt, from <malloc.h>."""
MADV_HUGEPAGE = 14
"""Advice of madvise(2)."""


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on. Returns False without glibc."""
    # No memory is returned to the kernel, and none is mapped outside the heap.
    try:
        libc = ctypes.CDLL(None)
        is_kept = bool(libc.mallopt(M_TRIM_THRESHOLD, -1)) and bool(libc.mallopt(M_MMAP_MAX, 0))
    except (AttributeError, OSError, TypeError):
        return False
    if is_kept:
        reserve_huge_pages(libc)
    return is_kept


def reserve_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap by three quarters of the machine's memory, in huge pages, and free it again.

    The range is not touched, so it takes no memory. As the heap is not trimmed, later allocations
    come from it.
    """
    if sys.platform == "win32":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 4 * 3
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if block:
        # madvise(2) wants whole pages
        start = -(-block // page) * page
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size - page), MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def release_freed_memory() -> None:
    """Return freed memory to the system for a smaller phase, by malloc_trim(3); nothing without
    glibc."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def measure_peak_memory_gib() -> float | None:
    """Return the largest resident set of this process so far, GiB; on Windows the working set."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    # macOS counts bytes, Linux KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def reset_peak_memory() -> None:
    """Restart `measure_peak_memory_gib` from what is resident now, on systems that can (proc(5),
    clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def enable_expandable_segments() -> None:
    """Let PyTorch grow its blocks of GPU memory, unless the user chose. Call it before importing
    torch."""
    if sys.platform.startswith("linux") and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def watch_parent(parent: int, on_exit: Callable[[], object]) -> None:
    """Call `on_exit` in a thread as soon as the process `parent` has ended, even as a zombie."""
    import psutil

    def wait() -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(parent)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)
        on_exit()

    Thread(target=wait, daemon=True).start()


def send_stop_request(run_dir: Path) -> None:
    """Ask the process that `start_process` has started there to end after a step, with a
    checkpoint.

    The process looks for this file (`cli.terminal.StopRequest`): on Windows SIGTERM would end it.
    """
    (run_dir / STOP_FILE_NAME).touch()


def kill_process(pid: int) -> None:
    """Kill a process, its children first. Files that it has saved stay."""
    import psutil

    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()


def has_stopped_answering(requested_time: float, run_dir: Path) -> bool:
    """Return whether the process has written no event and no log line for MAX_SILENCE_SEC.

    requested_time: when it was asked to stop, seconds since 1970
    """
    files = [run_dir / name for name in (METRICS_NAME, JOB_LOG_NAME)]
    written = [file.stat().st_mtime for file in files if file.exists()]
    return time.time() - max([requested_time, *written]) > MAX_SILENCE_SEC


def has_been_killed(code: int | None, log_tail: str) -> bool:
    """Return whether a process that recorded no end was killed.

    Its log decides without an exit status, and on Windows, where a killed process has no special
    one.
    """
    if code is not None and IS_POSIX:
        return code < 0
    return "rror" not in _find_last_line(log_tail)


def explain_ending(code: int | None, log_tail: str, *, is_stop_requested: bool) -> str:
    """Return the reason why a process ended that recorded no end.

    code: its exit status; None if an earlier server had started it
    log_tail: the end of its log
    is_stop_requested: whether it was asked to stop
    """
    last_line = _find_last_line(log_tail)
    if code in SIGTERM_STATUSES and is_stop_requested:
        return STOPPED_EARLY_MESSAGE

    # A process that the system kills for want of memory writes no message.
    if has_been_killed(code, log_tail):
        cause = "" if is_stop_requested else ", perhaps for want of memory"
        return f"The process was killed{cause}; its last words: {last_line or 'none'}"
    return last_line or "The process ended without a word."


def _find_last_line(log_tail: str) -> str:
    """Return the last line of the log that is not a progress bar."""
    lines = [line for line in log_tail.splitlines() if line.strip() and "%|" not in line]
    return lines[-1][:300] if lines else ""


IS_POSIX = os.name == "posix"
"""Whether there are sessions, inherited files, and exit statuses that name a signal."""
JOB_CONFIG_NAME = "job_config.json"
"""File of a run's settings."""
JOB_LOG_NAME = "job.log"
"""File of a run's terminal output."""
TRAIN_ARGUMENTS = ("-P", "-m", "dreambooth_moslora", "train")
"""Arguments of Python that start a training; -P: no `torch.py` of the current folder is imported.
"""
STOP_FILE_NAME = "job.stop"
"""File that asks the run to stop."""
STOP_FILE_VARIABLE = "DREAMBOOTH_STOP_FILE"
"""Environment variable with the path of that file."""
MAX_SILENCE_SEC = 1200.0
"""Longest silence of a process that was asked to stop: a CPU saves and verifies SDXL's adapter in
minutes."""
STOPPED_EARLY_MESSAGE = "It was stopped before training had begun."
SIGTERM_STATUSES = (-signal.SIGTERM, signal.SIGTERM)
"""Exit statuses of `terminate`; on Windows it is SIGTERM's number without a sign."""
MAX_TAIL_LINES = 40
MAX_TAIL_BYTES = 64 * 1024


def write_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that the process will read which `start_process` starts there."""
    (run_dir / JOB_CONFIG_NAME).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def start_process(
    run_dir: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    inherited_files: Sequence[int] = (),
) -> subprocess.Popen:
    """Start Python in a session of its own, its output to a log.

    run_dir: gets the log; a request to stop an earlier process is removed from it
    arguments: of Python
    environment: variables to add
    folder: in which it runs; None for the current one
    inherited_files: open files that are passed on, but not on Windows
    """
    (run_dir / STOP_FILE_NAME).unlink(missing_ok=True)
    # Output reaches the log line by line.
    variables = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        STOP_FILE_VARIABLE: os.path.abspath(run_dir / STOP_FILE_NAME),
    }
    variables |= {**get_import_environment(), **(environment or {})}
    with (run_dir / JOB_LOG_NAME).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            cwd=folder,
            **get_detach_options(inherited_files),
        )


def get_detach_options(inherited_files: Sequence[int]) -> dict[str, Any]:
    """Return the options of Popen by which no Ctrl-C here and no closed terminal reaches the
    process."""
    if IS_POSIX:
        return {"start_new_session": True, "pass_fds": inherited_files}
    return {"creationflags": getattr(subprocess, "CREATE_NO_WINDOW", 0)}


def read_log_tail(run_dir: Path) -> str:
    """Return the last lines of the log, with the last state of progress bars; "" without a log."""
    try:
        with (run_dir / JOB_LOG_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.split("\n") if line.strip()]
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines[-MAX_TAIL_LINES:])
