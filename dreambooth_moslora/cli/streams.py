"""Standard output and error whose failures never end a run.

In `train … | tee log` Ctrl-C ends `tee` first, and a terminal may be closed; the run must still save its folder
and return its own exit code. After a failed write a stream is redirected to the null device. Characters that
the terminal cannot encode are written as escapes.
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
    """A text stream that drops its output once a write has failed."""

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
    """In this block `sys.stdout` and `sys.stderr` survive the end of their reader."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(breakable, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def breakable(stream: TextIO | None) -> BreakableStream:
    """Wrap a stream. None, Python's value for a stream closed from the start (`2>&-`), becomes the null device."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return BreakableStream(stream)
