"""Files and folders that appear complete or not at all: temporary name, fsync, rename."""

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from dreambooth_moslora.disk.process_identity import get_current_token, get_host_id, is_running

TEMPORARY_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<pid>[0-9]{1,9})-(?P<token>[0-9a-f]{8})(-(?P<host>[0-9a-f]{8}))?"
    r"\.(?P<kind>new|old)"
)
"""Name of a temporary: the final name, the process and host that made it, and whether it holds the
new content or the old."""
MAX_FOREIGN_AGE_SEC = 24 * 60 * 60.0
"""Age from which a temporary of another host is removed: whether its process runs is unknown."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file completely, or leave its old content. The folder must exist."""
    path = Path(path)
    temporary = build_temporary_path(path, "new")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        rename_with_retry(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


OPEN_FILE_ERRORS = (5, 32)
"""Errors of Windows for a file that another program has open (ERROR_ACCESS_DENIED,
ERROR_SHARING_VIOLATION)."""
RENAME_TIMEOUT_SEC = 10.0
RENAME_RETRY_SEC = 0.1


def rename_with_retry(source: Path, target: Path) -> None:
    """Call `os.replace`, and again for RENAME_TIMEOUT_SEC while another program has a file open.

    Only Windows refuses that: the program may be a viewer, or a scanner of viruses. Raises the last
    PermissionError.
    """
    end = time.monotonic() + RENAME_TIMEOUT_SEC
    while True:
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in OPEN_FILE_ERRORS or time.monotonic() > end:
                raise
        time.sleep(RENAME_RETRY_SEC)


@contextmanager
def make_scratch_directory(folder: Path, name: str = "scratch") -> Iterator[Path]:
    """Create a folder in `folder` for the duration of the block, and remove those of killed
    processes."""
    clean_temporaries(folder)
    scratch = build_temporary_path(folder / name, "new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with hold(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def write_atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with make_scratch_directory(path.parent, path.name) as temporary:
        yield temporary
        # All of it must be on the disk before it has its name.
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        sync_folder(temporary)

        # The old folder steps aside, and comes back if the new one cannot take its place.
        old = build_temporary_path(path, "old")
        if path.exists():  # `restore_directories` repairs a kill between the two renames
            rename_with_retry(path, old)
        try:
            rename_with_retry(temporary, path)
        except OSError:
            with suppress(FileNotFoundError):
                rename_with_retry(old, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Rename a folder, so that its name is free at once, then delete it.

    A folder that another program uses stays whole, with a warning.
    """
    renamed = build_temporary_path(path, "new")
    try:
        rename_with_retry(path, renamed)
    except PermissionError as error:
        logging.getLogger(__name__).warning("%s was not removed: %s", path, error.strerror)
    else:
        shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Lock a folder for the block, and yield whether no other process has locked it.

    The lock also shows a process of another container, whose number is not visible here. Yields
    True where folders cannot be locked, as on Windows.
    """
    with ExitStack() as stack:
        is_free = True
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            is_free = lock_descriptor(handle, blocking=False)
        yield is_free


def build_temporary_path(path: Path, kind: str) -> Path:
    maker = f"{os.getpid()}-{get_current_token(os.getpid())}-{get_host_id()}"
    return path.with_name(f".{path.name}.{maker}.{kind}")


def restore_directories(folder: Path) -> None:
    """Restore a folder's name after a kill between the two renames of its replacement."""
    for path, match in list_temporaries(folder):
        target = folder / match["name"]
        is_old = match["kind"] == "old" and path.is_dir()
        if is_old and not target.exists() and not is_in_use(path, match):
            with suppress(OSError):
                os.replace(path, target)


def clean_temporaries(folder: Path) -> None:
    """Remove temporaries of processes that no longer run from `folder`."""
    restore_directories(folder)
    for path, match in list_temporaries(folder):
        if is_in_use(path, match):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def list_temporaries(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """Return the temporaries in the folder, each with the match of its name."""
    matches = [(path, TEMPORARY_NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return [(path, match) for path, match in matches if match]


def is_in_use(path: Path, name_match: re.Match[str]) -> bool:
    """Return whether the process that made the temporary still runs, or may run on another host.

    Each process removes its own temporaries itself.
    """
    if name_match["host"] in (None, get_host_id()):
        with hold(path) as is_free:
            return is_running(int(name_match["pid"]), name_match["token"]) or not is_free
    # A rename changes this time, and no other of a folder.
    with suppress(OSError):
        return time.time() - path.stat().st_ctime < MAX_FOREIGN_AGE_SEC
    return True


def sync_folder(folder: Path) -> None:
    """Flush renames in the folder to the disk; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
