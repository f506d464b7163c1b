"""Which process made a file, and whether it still runs: systems use process numbers again."""

import hashlib
import platform
import secrets
from functools import cache
from pathlib import Path


@cache
def get_current_token(pid: int) -> str:
    """`compute_process_token` of this process; `pid` is its own."""
    return compute_process_token(pid) or secrets.token_hex(4)


@cache
def get_host_id() -> str:
    """Distinguishes this machine or container from others that share a folder with it."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def compute_process_token(pid: int) -> str:
    """Distinguishes a running process from an earlier one of the same number: systems use numbers
    again. "" without a process, and where its start is not told."""
    birth = read_process_start(pid)
    return hashlib.blake2b(f"{pid} {birth}".encode(), digest_size=4).hexdigest() if birth else ""


def read_process_start(pid: int) -> str:
    """When the process was started: on Linux the machine's boot and the tick, which no change of
    the clock alters, elsewhere the time. "" without a process, and if it is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # proc(5): the fields follow the program's name, which may hold spaces and brackets.
        facts = stat.rpartition(")")[2].split()
        return f"{boot} {facts[19]}"
    except (OSError, IndexError):
        import psutil

        try:
            return repr(psutil.Process(pid).create_time())
        except psutil.Error:
            return ""


def is_running(pid: int, token: str) -> bool:
    """Whether the process with this `compute_process_token` still runs; by its number alone where
    its start is not told. It is not asked by a signal: on Windows `os.kill(pid, 0)` ends the
    process."""
    import psutil

    now = compute_process_token(pid)
    return now == token if now else psutil.pid_exists(pid)
