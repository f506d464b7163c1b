"""Files and folders that are there whole or not at all.

Everything is written beside its final name, flushed to the disk, then renamed. A process killed at any moment leaves
temporaries, which begin with a dot and are removed by the next run, and never a half-written file under a real name.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

__all__ = [
    "atomic_directory",
    "atomic_write",
    "clean_stale",
    "recover",
    "remove_directory",
    "scratch_directory",
]

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(-(?P<token>[0-9a-f]+))?\.(?P<kind>new|old)")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file whole, or leave what was there. The folder must exist."""
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
    """Yield a temporary folder beside `path`; it takes the name `path`, whole, when the block ends without an error."""
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
    """A folder in `folder` for the length of the block. What a killed process left of its own is removed."""
    clean_stale(folder)
    scratch = temporary_name(folder / "scratch", "new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Two renames where `path` exists; a kill between them is mended by `recover`."""
    old = temporary_name(path, "old")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """It is gone under its name at once, however long the removal takes."""
    doomed = temporary_name(path, "new")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{process_token(os.getpid())}.{kind}")


@cache
def process_token(pid: int) -> str:
    """Tells this process from an earlier one of the same number: in containers numbers come again."""
    return secrets.token_hex(4)


def recover(folder: Path) -> None:
    """Give a folder its name back when a kill fell between the two renames of its replacement."""
    for path, match in temporaries(folder):
        target = folder / match["name"]
        if match["kind"] == "old" and path.is_dir() and not target.exists() and not is_in_use(match):
            with suppress(OSError):
                os.replace(path, target)


def clean_stale(folder: Path) -> None:
    """Remove what processes that no longer run left half-written in `folder`."""
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
    """Whether the process that made it runs. This process cleans up after itself."""
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
    """Make renames in the folder last; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
