"""Standard output and error that never end a run: what cannot be written any more is left out, what the terminal has
no letters for is spelled out.

`train … | tee log` and Ctrl-C end `tee` first, and a terminal may be closed: the run has its folder to save, and its
own exit code. From the first failed write on, the stream goes to nowhere.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO

__all__ = ["STDERR", "survive_broken_pipes"]

STDERR = 2


class BreakableStream:
    """A text stream whose reader may leave."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def survive_broken_pipes() -> Iterator[None]:
    """`sys.stdout` and `sys.stderr` are lasting inside."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(breakable, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def breakable(stream: TextIO | None) -> BreakableStream:
    """A stream that was closed from the start (`2>&-`) is None in Python."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return BreakableStream(stream)
