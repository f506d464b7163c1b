"""Terminal: streams that never end a run, Ctrl-C as a request to stop, events as lines and bars,
exit codes.

In `train … | tee log` Ctrl-C ends `tee` first; the run must still save and return its exit code. So
Ctrl-C, SIGTERM and a closed terminal (SIGHUP) only set a flag, which the loop checks between two
steps. A stop file, made by the page, a queue or a fleet's worker, has the same effect.
"""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from io import TextIOWrapper
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from dreambooth_moslora.base.devices import is_main_process
from dreambooth_moslora.disk import events, processes
from dreambooth_moslora.errors import UserError, escape_control_characters, is_out_of_memory
from dreambooth_moslora.settings.metric_kinds import describe_scores

MIN_SILENCE_SEC = 3.0
"""Time without output after which the seconds are shown."""
SILENCE_INTERVAL_SEC = 1.0
EXIT_DONE = 0
EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
"""Exit codes; 130 is the one that shells give after Ctrl-C."""


def print_lines(lines: Iterable[str]) -> None:
    """Print the lines on standard error, in the first process only."""
    if is_main_process():
        for line in lines:
            print(escape_control_characters(line), file=sys.stderr)


def print_loading() -> None:
    """Tell a waiting user that PyTorch is being imported, which takes a minute on a busy machine.
    Prints nothing once it is imported, and nothing into a file."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        print_lines(["loading PyTorch …"])


class SilenceCounter:
    """Seconds since the last output, shown on a terminal below the last line.

    Imports, loading and saving take longer than a user waits without a sign of life. A bar that is
    not at its end stays as it is.
    """

    def __init__(self, terminal: TextIO):
        self.terminal = terminal
        self.lock = threading.RLock()
        self.last_output_sec = time.monotonic()
        self.is_line_complete = True
        self.shown = ""
        self.ended = threading.Event()

    def record_output(self, text: str) -> None:
        """Remove the count before the next output."""
        if self.shown:
            self.terminal.write("\r" + " " * len(self.shown) + "\r")
            self.shown = ""
        self.last_output_sec = time.monotonic()
        self.is_line_complete = text.endswith("\n")

    def count(self) -> None:
        """Show the count once a second until the end."""
        while not self.ended.wait(SILENCE_INTERVAL_SEC):
            with self.lock, suppress(OSError):
                seconds = time.monotonic() - self.last_output_sec
                if seconds >= MIN_SILENCE_SEC and self.is_line_complete:
                    self.shown = f"… {seconds:.0f} s"
                    self.terminal.write(f"\r{self.shown}")
                    self.terminal.flush()

    @contextmanager
    def run(self) -> Iterator[None]:
        """Count for the duration of the block."""
        thread = threading.Thread(target=self.count, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join()


class BreakableStream:
    """Text stream that sends its output to the null device once a write has failed.

    silence: counter that is told of the output, if there is a terminal
    """

    def __init__(self, stream: TextIO, silence: SilenceCounter | None = None):
        self._stream = stream
        self._silence = silence

    def write(self, text: str) -> int:
        self._run_or_drop(lambda: self._write(text))
        return len(text)

    def _write(self, text: str) -> None:
        if self._silence is None:
            self._stream.write(text)
            return
        with self._silence.lock:
            self._silence.record_output(text)
            self._stream.write(text)

    def flush(self) -> None:
        self._run_or_drop(self._stream.flush)

    def _run_or_drop(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            # Buffered and later output goes to the null device.
            with open(os.devnull, "wb") as null_device:
                os.dup2(null_device.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def ignore_broken_pipes() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` by streams that survive their reader and escape
    characters that the encoding lacks."""
    original = sys.stdout, sys.stderr

    # A process without a terminal may have no streams at all.
    streams = [
        stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in original
    ]
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    counter = SilenceCounter(streams[1]) if streams[1].isatty() and is_main_process() else None
    sys.stdout, sys.stderr = (BreakableStream(stream, counter) for stream in streams)
    try:
        with counter.run() if counter else nullcontext():
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = original


STOP_MESSAGES = (
    "\nstopping after this step, then saving; Ctrl-C twice more to leave at once without saving\n",
    "\nstill finishing the step and saving; once more to leave at once\n",
)
"""Messages after the first and the second Ctrl-C; a third one ends the process."""


class StopRequest:
    """Context manager; calling it tells whether a stop was requested, by a signal or by the stop
    file (`disk.processes.send_stop_request`). A third Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._file = os.environ.get(processes.STOP_FILE_VARIABLE, "")
        self._interrupts = 0
        self._previous_handlers: dict[int, object] = {}

    def __call__(self) -> bool:
        self.requested = self.requested or os.path.exists(self._file)
        return self.requested

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]

            # Windows lacks SIGHUP; under `nohup` it stays ignored.
            hangup = getattr(signal, "SIGHUP", None)
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
                numbers.append(hangup)
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in numbers
            }
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.unlink(self._file)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        """Note the request and answer on the terminal, the first time and at each Ctrl-C."""
        is_first = not self.requested
        self.requested = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > len(STOP_MESSAGES):
                os._exit(EXIT_INTERRUPTED)
        if is_first or number == signal.SIGINT:
            # Not Python's stderr, which may be in the middle of a write. The pipe may be closed:
            # the same Ctrl-C stops `| tee`.
            with suppress(OSError):
                os.write(2, STOP_MESSAGES[max(0, self._interrupts - 1)].encode())


PHASE_TITLES = {
    "loading": "loading the base",
    "captions": "captions",
    "masks": "masks",
    "class_images": "class images",
    "caching": "encoding photos",
    "sampling": "generating samples",
    "evaluating": "scoring",
    "exporting": "saving and verifying the adapter",
}
"""Phases before and between the steps -> titles of their bars."""
TRAINING_TITLE = "training"
"""Title of the bar of steps."""
STEP_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
"""Leaves out tqdm's forecast, which would count the time of scoring and sampling as time of
steps."""


def create_bar(
    total: int, title: str, unit: str, stream: TextIO | None = None, **options: Any
) -> tqdm:
    """Create a progress bar on standard error, or on `stream`; in a file it is a line every five
    seconds."""
    stream = stream or sys.stderr
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        file=stream,
        mininterval=0.2 if stream.isatty() else 5.0,
        maxinterval=60.0,
        **options,
    )


class TerminalProgress:
    """Progress of a run on a terminal or in a file; call it with each event of
    `training.loop.train`."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total_steps = 0
        self._bar: tqdm | None = None
        self._inner_bar: tqdm | None = None  # below the bar of steps
        self._phase = ""

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self.total_steps = event.max_train_steps
            case events.PhaseProgress():
                self._show_phase(event)
            case events.StepDone():
                self._show_step(event)
            case events.CheckpointSaved():
                self.write(f"step {event.step}: checkpoint {event.path}")
            case events.SamplesSaved():
                self.write(f"step {event.step}: {len(event.files)} sample images")
            case events.StepEvaluated():
                self._show_scores(event)
            case events.RunEnded():
                self.close()

    def close(self) -> None:
        """Close the bars, if there are any."""
        self._close_inner_bar()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""

    def _close_inner_bar(self) -> None:
        if self._inner_bar is not None:
            self._inner_bar.close()
            self._inner_bar = None

    def write(self, line: str) -> None:
        """Write a line above the bar."""
        tqdm.write(line, file=self.stream)

    def _open(self, title: str, total: int, start: int, unit: str) -> None:
        self.close()
        bar_format = STEP_BAR_FORMAT if title == TRAINING_TITLE else None
        self._bar = create_bar(
            total, title, unit, self.stream, initial=start, bar_format=bar_format
        )
        self._phase = title

    def _show_phase(self, event: events.PhaseProgress) -> None:
        title = PHASE_TITLES.get(event.phase)
        if title is None:
            return

        # A single item is a line; it must not tear the bar of steps.
        if event.total <= 1:
            self._close_inner_bar()
            if self._phase != TRAINING_TITLE or event.phase == "exporting":
                self.close()
                self.write(f"{title} …")
            return
        unit = "step" if event.phase in ("sampling", "evaluating") else "image"
        if self._phase == TRAINING_TITLE:
            self._show_inner_phase(title, event, unit)
            return
        if self._phase != title:
            self._open(title, event.total, event.done, unit)
        self._update_bar(event.done)

    def _show_inner_phase(self, title: str, event: events.PhaseProgress, unit: str) -> None:
        """Show samples and scores between two steps by a bar below that of the steps."""
        if self._inner_bar is None:
            self._inner_bar = create_bar(
                event.total, title, unit, self.stream, position=1, leave=False
            )
        self._inner_bar.update(event.done - self._inner_bar.n)
        if event.done >= event.total:
            self._close_inner_bar()

    def _show_scores(self, event: events.StepEvaluated) -> None:
        scores = describe_scores(event.scores).values()
        self.write(f"step {event.step}: {', '.join(scores)}")

    def _show_step(self, event: events.StepDone) -> None:
        self._close_inner_bar()
        if self._phase != TRAINING_TITLE:
            self._open(TRAINING_TITLE, self.total_steps, event.step - 1, "step")

        postfix = {}
        if event.eta_sec is not None:
            postfix["left"] = tqdm.format_interval(event.eta_sec)
        postfix["loss"] = f"{event.loss:.3f}"
        self._bar.set_postfix(postfix, refresh=False)
        self._update_bar(event.step)

    def _update_bar(self, done: int) -> None:
        self._bar.update(done - self._bar.n)
        if done >= (self._bar.total or 0):
            self.close()


OUT_OF_MEMORY_MESSAGE = (
    "out of memory: try --gradient_checkpointing, --train_batch_size 1, --mixed_precision bf16 "
    "(fp16 on Nvidia GPUs before Ampere), a smaller --resolution or --base_quantization nf4; "
    "--dry_run estimates the need."
)
"""Error line of a run that needs too much memory."""


def run_to_exit_code(run: Callable[[], int]) -> int:
    """Run, and return the exit code. An error becomes one line; a closed pipe (`| head`) does not
    end the run."""
    processes.enable_expandable_segments()
    with ignore_broken_pipes():
        try:
            return copy_context().run(run)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            line = describe_known_error(error)
            if line is None:
                # An unforeseen error is our bug, and its traceback helps to find it.
                traceback.print_exc()
                return EXIT_BUG
            print(f"error: {escape_control_characters(' '.join(line.split()))}", file=sys.stderr)
            return EXIT_MISTAKE


def describe_known_error(error: Exception) -> str | None:
    """Return one line for a user's mistake or an error of the machine (memory, disk, permissions),
    or None for any other error."""
    if isinstance(error, UserError):
        return str(error)

    if is_out_of_memory(error):
        return OUT_OF_MEMORY_MESSAGE

    # A library's OSError has no message of the system.
    if not isinstance(error, OSError) or not error.strerror:
        return None

    # When a rename fails, the user knows the second name.
    name = error.filename2 or error.filename
    suffix = f": {name}" if name else ", while a file was written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}{suffix}; free some of the disk and resume."
    return f"{error.strerror}{suffix}."
