"""One run at a time in a run folder: a locked file names the process and machine that hold it.

The system releases the lock when the process ends in any way, so the file of a killed run blocks nobody.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dreambooth_moslora.core.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows the file names the owner but does not lock
    fcntl = None

__all__ = ["LOCK_NAME", "locked", "take"]

LOCK_NAME = "run.lock"


@contextmanager
def locked(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Hold the existing `folder`, which the option `flag` names, for the length of the block.

    Raises UserError when another run holds it.
    """
    path = folder / LOCK_NAME
    file = take(path, flag)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def take(path: Path, flag: str) -> BinaryIO:
    """Open and lock the file of that name. If its owner removes it meanwhile, it is created again.

    Raises UserError when another process holds it.
    """
    while True:
        file = path.open("a+b")
        try:
            lock(file)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace").strip() or "another process"
            file.close()
            raise UserError(
                f"{flag} {path.parent}: {owner} is training there; wait for its end, or name another folder."
            ) from None
        file.close()


def lock(file: BinaryIO) -> None:
    """Raises BlockingIOError when another process holds the lock. On a file system without locks it does nothing."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return
