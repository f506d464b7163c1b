"""`lock(file)`: the lock on a file that the system releases when its process ends in any way."""

import sys
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
    import os

    LOCKED_BYTE = 2**31 - 2
    """Behind all content: what Windows has locked no other process can read, and the file names its owner."""

    def take_lock(number: int) -> None:
        os.lseek(number, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
        finally:
            os.lseek(number, 0, os.SEEK_SET)

else:
    import fcntl

    def take_lock(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock(file: BinaryIO) -> None:
    """Raises BlockingIOError when another process holds the lock. On a file system without locks it does nothing."""
    try:
        take_lock(file.fileno())
    except BlockingIOError:
        raise
    except OSError:
        return
