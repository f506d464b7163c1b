"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) as a stop request, which the loop checks between two steps.

The handler only sets a flag, so that no file is cut off while it is saved. A second Ctrl-C prints a message; a
third ends the process at once. That loses the steps since the last checkpoint, but no file (see
`core.atomic_files`).
"""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

from dreambooth_moslora.cli.streams import STDERR

__all__ = ["StopRequest"]

MESSAGES = (
    "\nstopping after this step, then saving; Ctrl-C twice more to leave at once without saving\n",
    "\nstill finishing the step and saving; once more to leave at once\n",
)
INTERRUPTED = 130


class StopRequest:
    """Context manager. Calling it returns whether the user or the system asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in signals_to_hear():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > len(MESSAGES):
                os._exit(INTERRUPTED)
        if first or number == signal.SIGINT:
            with suppress(OSError):  # a closed pipe: the same Ctrl-C stopped `| tee`
                os.write(STDERR, MESSAGES[max(0, self._interrupts - 1)].encode())


def signals_to_hear() -> list[int]:
    """The signals to handle. SIGHUP is left out under `nohup` and on Windows, which lacks it."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]
