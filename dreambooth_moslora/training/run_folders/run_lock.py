"""One run at a time in a run folder: a locked file names the process and the machine that hold it.

The system lets go of the lock when the process ends, however it ends. So a file that a killed run left
holds nobody up.
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
except ImportError:  # Windows: the file says who is there, and nobody is held up
    fcntl = None

__all__ = ["LOCK_NAME", "locked", "take"]

LOCK_NAME = "run.lock"


@contextmanager
def locked(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Hold the existing `folder`, which `flag` names, for the length of the block.

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
    """The file of that name, open and locked. An owner that ends meanwhile removes it: then it is made anew.

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
    """Raises BlockingIOError when another process has it. A file system without locks gives none."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return
