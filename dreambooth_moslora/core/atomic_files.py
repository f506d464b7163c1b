"""Writes files and folders completely or not at all.

Everything is written beside its final name, flushed to the disk, then renamed. A killed process leaves only
temporaries, whose names begin with a dot and which the next run removes; it never leaves a half-written file
under a real name.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]{1,9})-(?P<token>[0-9a-f]{8})\.(?P<kind>new|old)")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file completely, or leave its old content. The folder must exist."""
    path = Path(path)
    temporary = temporary_name(path, "new")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it is renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_stale(path.parent)
    temporary = temporary_name(path, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def scratch_directory(folder: Path) -> Iterator[Path]:
    """A folder in `folder` for the length of the block. Folders that a killed process left are removed."""
    clean_stale(folder)
    scratch = temporary_name(folder / "scratch", "new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`. It takes two renames if `path` exists; `recover` repairs a kill between
    them."""
    old = temporary_name(path, "old")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Rename the folder, so that its name is free at once, then delete it."""
    doomed = temporary_name(path, "new")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{process_token(os.getpid())}.{kind}")


@cache
def process_token(pid: int) -> str:
    """Distinguishes this process from an earlier one of the same number: containers reuse numbers."""
    return secrets.token_hex(4)


def recover(folder: Path) -> None:
    """Restore a folder's name after a kill between the two renames of its replacement."""
    for path, match in temporaries(folder):
        target = folder / match["name"]
        if match["kind"] == "old" and path.is_dir() and not target.exists() and not is_in_use(match):
            with suppress(OSError):
                os.replace(path, target)


def clean_stale(folder: Path) -> None:
    """Remove temporaries of processes that no longer run from `folder`."""
    recover(folder)
    for path, match in temporaries(folder):
        if is_in_use(match):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def temporaries(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    return [(path, match) for path in folder.iterdir() if (match := TEMPORARY.fullmatch(path.name))]


def is_in_use(temporary: re.Match[str]) -> bool:
    """Whether the process that made it still runs. This process removes its own temporaries itself."""
    pid = int(temporary["pid"])
    if pid == os.getpid():
        return temporary["token"] == process_token(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush renames in the folder to the disk; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
