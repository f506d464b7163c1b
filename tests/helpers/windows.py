"""Windows' answers on Linux: what the run folder, its lock, a stop and the queue may not count on
there.

A signal ends a process, so none may be sent; `terminate` kills; a file that is open here, or
mapped, is neither removed nor replaced, nor is a folder around it; no folder replaces another, or
is opened; there is no fcntl, no resource, and no file is handed on. What is asked of the machine
itself stays: these are no tests on Windows.
"""

import os
import sys
from pathlib import Path
from subprocess import Popen
from types import ModuleType

import filelock  # noqa: F401  # its fcntl stays: the system's own lock is asked
import psutil
import pytest

HELPERS = Path(__file__).parent
CHILDREN = {"PYTHONPATH": os.pathsep.join([str(HELPERS / "as_windows"), str(HELPERS.parents[1])])}
"""Environment of a program that gets the answers too."""
PRODUCT = "dreambooth_moslora"
ACCESS_DENIED, SHARING_VIOLATION = 5, 32


class FakeSys(ModuleType):
    """`sys` as a module of Windows sees it."""

    platform = "win32"

    def __getattr__(self, name: str):
        return getattr(sys, name)


def denied(path: str, winerror: int) -> PermissionError:
    error = PermissionError(13, "The process cannot access the file", path)
    error.winerror = winerror
    return error


def open_files() -> set[str]:
    """Of this process, with those that are mapped into its memory."""
    paths = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            paths.add(os.readlink(entry.path))
        except OSError:  # the one that lists them
            continue
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        paths.add(line[line.index("/") :] if "/" in line else "")
    return paths


def refuse_open(path: str, dir_fd: int | None = None) -> None:
    folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
    whole = os.path.realpath(os.path.join(folder, os.fspath(path)))
    if any(name == whole or name.startswith(f"{whole}/") for name in open_files()):
        raise denied(path, SHARING_VIOLATION)


def answer_as_windows(patch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError in the program where it sends a signal or hands on a file."""
    from dreambooth_moslora.disk import processes

    kill, replace, unlink, begin = os.kill, os.replace, os.unlink, Popen.__init__
    open_handle = os.open

    def opened(path, flags: int, *mode, **folders) -> int:
        is_ours = sys._getframe(1).f_globals["__name__"].startswith(PRODUCT)
        if is_ours and os.path.isdir(path):
            raise denied(path, ACCESS_DENIED)
        return open_handle(path, flags, *mode, **folders)

    def no_signal(pid: int, number: int) -> None:
        assert not sys._getframe(1).f_globals["__name__"].startswith(PRODUCT), (
            "a signal ends the process"
        )
        kill(pid, number)

    def replaced(source, target, **folders) -> None:
        for path in (source, target):
            refuse_open(path)
        if os.path.isdir(target):
            raise denied(source, ACCESS_DENIED)
        replace(source, target, **folders)

    def unlinked(path, *, dir_fd=None) -> None:
        refuse_open(path, dir_fd)
        unlink(path, dir_fd=dir_fd)

    def begun(process: Popen, *args, **options) -> None:
        assert not options.get("pass_fds"), "no file is handed on"
        begin(process, *args, **options)

    patch.setattr(os, "kill", no_signal)
    patch.setattr(os, "open", opened)
    for name in ("replace", "rename"):
        patch.setattr(os, name, replaced)
    for name in ("unlink", "remove"):
        patch.setattr(os, name, unlinked)
    patch.setattr(Popen, "__init__", begun)
    for kind in (Popen, psutil.Process):
        patch.setattr(kind, "terminate", kind.kill)
    for name in ("fcntl", "resource"):
        patch.setitem(sys.modules, name, None)
    patch.setattr(processes, "IS_POSIX", False)
    patch.setattr(processes, "sys", FakeSys("sys"))
    patch.setattr(processes, "measure_peak_memory_gib", lambda: None)  # Linux tells no working set
