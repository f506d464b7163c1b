"""Longest times in which a command prints nothing, on a terminal.

    python -m benchmarks.silence [--gaps 3] -- python train_dreambooth.py …

The command runs on a pseudo-terminal of its own. A row for each of its longest gaps: its seconds,
when it began, and the last line before it. On a busy machine the gaps grow like the whole time,
which is printed with the processor's time. Linux and macOS.
"""

import argparse
import os
import pty
import re
import resource
import subprocess
import sys
import termios
import time
from typing import NamedTuple

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Codes of colours and of the cursor."""
LINES, COLUMNS = 40, 100
"""Size of the terminal: on one of no size no bar is drawn."""


class Gap(NamedTuple):
    """Time without output: its length and its begin in seconds, and the line before it."""

    seconds: float
    start: float
    line: str


def measure_gaps(command: list[str]) -> tuple[list[Gap], int]:
    """Run the command on a pseudo-terminal. Return its gaps in their order, the one before the
    first output and the one after the last included, and its exit code."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (LINES, COLUMNS))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)
    os.close(terminal)

    # Each read is a sign of life. The end of the terminal is an error on Linux.
    start = last = time.monotonic()
    gaps, line = [], ""
    while True:
        try:
            output = os.read(master, 65536)
        except OSError:
            output = b""
        now = time.monotonic()
        gaps.append(Gap(now - last, last - start, line))
        if not output:
            break
        last, line = now, get_last_line(output.decode(errors="replace")) or line
    os.close(master)
    return gaps, process.wait()


def get_last_line(output: str) -> str:
    """Return the last line of the output that is not empty, as a terminal shows it."""
    lines = [text.strip() for text in re.split(r"[\r\n]", ESCAPES.sub("", output))]
    return next((text for text in reversed(lines) if text), "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gaps", type=int, default=3, help="rows to print")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    args = parser.parse_args(argv)
    command = [word for word in args.command if word != "--"]

    started = time.monotonic()
    gaps, exit_code = measure_gaps(command)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{time.monotonic() - started:.1f} s, processor {usage.ru_utime + usage.ru_stime:.1f} s, "
        f"exit code {exit_code}"
    )
    print("| silent s | from s | after the line |\n|---|---|---|")
    for gap in sorted(gaps, reverse=True)[: args.gaps]:
        print(f"| {gap.seconds:.1f} | {gap.start:.1f} | {gap.line[:COLUMNS]} |")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
