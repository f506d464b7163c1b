"""Identity of the process that made a file: process numbers are reused."""

import hashlib
import platform
import secrets
from functools import cache
from pathlib import Path


@cache
def get_current_token(pid: int) -> str:
    """Return `compute_process_token` of this process; `pid` is its own."""
    return compute_process_token(pid) or secrets.token_hex(4)


@cache
def get_host_id() -> str:
    """Return a name for this machine or container among those that share a folder with it."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def compute_process_token(pid: int) -> str:
    """Return a name for a running process that an earlier one of the same number did not have.

    Returns "" if there is no such process, or its start is unknown.
    """
    birth = read_process_start(pid)
    return hashlib.blake2b(f"{pid} {birth}".encode(), digest_size=4).hexdigest() if birth else ""


def read_process_start(pid: int) -> str:
    """Return when the process was started; "" if there is no such process, or it is not readable.

    On Linux it is the boot and the tick, which a change of the clock does not alter; elsewhere the
    time.
    """
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
    """Return whether the process with this `compute_process_token` still runs.

    Where its start is unknown, its number alone decides. No signal is sent: on Windows
    `os.kill(pid, 0)` ends the process.
    """
    import psutil

    current_token = compute_process_token(pid)
    return current_token == token if current_token else psutil.pid_exists(pid)
