"""The terminal: streams that never end a run, Ctrl-C as a request to stop, events as lines and
bars, exit codes.

In `train … | tee log` Ctrl-C ends `tee` first; the run must still save and return its own exit
code. So Ctrl-C, SIGTERM and a closed terminal (SIGHUP) only set a flag, which the loop checks
between two steps. So does a file that a page, a queue or a fleet's worker makes.
"""

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from dreambooth_moslora.base.devices import is_main_process
from dreambooth_moslora.disk import events, processes
from dreambooth_moslora.errors import UserError, escape_control_characters, is_out_of_memory
from dreambooth_moslora.settings.metric_kinds import get_curve_labels

# The file descriptor: a signal handler must not use Python's stream, which may be in the middle of
# a write
STDERR = 2


def print_lines(lines: Iterable[str]) -> None:
    """Print the lines on standard error, in the first process only."""
    if is_main_process():
        for line in lines:
            print(escape_control_characters(line), file=sys.stderr)


def print_loading() -> None:
    """Tell a person who waits that PyTorch is being imported, which takes a minute on a busy
    machine; nothing once it is there, and in a file."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        print_lines(["loading PyTorch …"])


def disable_library_notes() -> None:
    """No bars while a base is loaded (but of downloads), and none of the libraries' notes that ask
    for nothing."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    logging.getLogger("diffusers.models.modeling_utils").addFilter(is_useful_record)
    # `describe_black_images` says it in words
    warnings.filterwarnings("ignore", "invalid value encountered in cast")


def is_useful_record(record: logging.LogRecord) -> bool:
    """Whether it is another record than diffusers' note about layers to keep in fp32 that names
    none."""
    return "should be kept in float32: []" not in record.getMessage()


class BreakableStream:
    """A text stream that drops its output once a write has failed: then it goes to the null
    device."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        self._run_or_drop(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what was buffered."""
        self._run_or_drop(self._stream.flush)

    def _run_or_drop(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            # What is still buffered, and all that follows, goes to the null device.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def ignore_broken_pipes() -> Iterator[None]:
    """In this block `sys.stdout` and `sys.stderr` survive their reader, and escape what cannot be
    encoded."""
    before = sys.stdout, sys.stderr

    # A process without a terminal may have no streams at all.
    streams = [
        stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in before
    ]
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(BreakableStream, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


# What the first and the second Ctrl-C say; a third one ends the process
STOP_MESSAGES = (
    "\nstopping after this step, then saving; Ctrl-C twice more to leave at once without saving\n",
    "\nstill finishing the step and saving; once more to leave at once\n",
)
# The exit code that shells give after Ctrl-C
EXIT_INTERRUPTED = 130


class StopRequest:
    """Context manager; calling it returns whether someone asked to stop, by a signal or by the file
    that the process's starter has named (`disk.processes.send_stop_request`). A third Ctrl-C ends
    the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._file = os.environ.get(processes.STOP_FILE_VARIABLE, "")
        self._interrupts = 0
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        self.requested = self.requested or os.path.exists(self._file)
        return self.requested

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]

            # Windows lacks SIGHUP, and `nohup` has it ignored.
            hangup = getattr(signal, "SIGHUP", None)
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
                numbers.append(hangup)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.unlink(self._file)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        first = not self.requested
        self.requested = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > len(STOP_MESSAGES):
                os._exit(EXIT_INTERRUPTED)
        if first or number == signal.SIGINT:
            with suppress(OSError):  # a closed pipe: the same Ctrl-C stopped `| tee`
                os.write(STDERR, STOP_MESSAGES[max(0, self._interrupts - 1)].encode())


# Phases before and between the steps -> the titles of their bars
PHASE_TITLES = {
    "loading": "loading the base",
    "captions": "captions",
    "masks": "masks",
    "class_images": "class images",
    "caching": "encoding photos",
    "sampling": "drawing samples",
    "evaluating": "scoring",
    "exporting": "saving and verifying the adapter",
}
# Title of the bar of steps
TRAINING_TITLE = "training"
STEP_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
"""Without the bar's own forecast, which would take the seconds of scoring and of samples for those
of a step."""


def create_bar(
    total: int, title: str, unit: str, stream: TextIO | None = None, **options: Any
) -> tqdm:
    """A bar of progress on standard error, or on `stream`; in a file a line every five seconds."""
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
    """Call it with each event of `training.loop.train`. `stream` may be a terminal or a file."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total_steps = 0
        self._bar: tqdm | None = None
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
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""

    def write(self, line: str) -> None:
        """Write a line above the bar."""
        tqdm.write(line, file=self.stream)

    def _open(self, title: str, total: int, start: int, unit: str) -> None:
        self.close()
        form = STEP_BAR_FORMAT if title == TRAINING_TITLE else None
        self._bar = create_bar(total, title, unit, self.stream, initial=start, bar_format=form)
        self._phase = title

    def _show_phase(self, event: events.PhaseProgress) -> None:
        title = PHASE_TITLES.get(event.phase)
        if title is None:
            return

        # A single item is a line; it must not tear the bar of steps.
        if event.total <= 1:
            if self._phase != TRAINING_TITLE or event.phase == "exporting":
                self.close()
                self.write(f"{title} …")
            return
        if self._phase != title:
            unit = "step" if event.phase == "sampling" else "image"
            self._open(title, event.total, event.done, unit)
        self._update_bar(event.done)

    def _show_scores(self, event: events.StepEvaluated) -> None:
        said = []
        for name, label in get_curve_labels().items():
            if name in event.scores:
                said.append(f"{label} {event.scores[name]:.3f}")
        self.write(f"step {event.step}: {', '.join(said)}")

    def _show_step(self, event: events.StepDone) -> None:
        if self._phase != TRAINING_TITLE:
            self._open(TRAINING_TITLE, self.total_steps, event.step - 1, "step")

        shown = {}
        if event.eta_sec is not None:
            shown["left"] = tqdm.format_interval(event.eta_sec)
        shown["loss"] = f"{event.loss:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._update_bar(event.step)

    def _update_bar(self, done: int) -> None:
        self._bar.update(done - self._bar.n)
        if done >= (self._bar.total or 0):
            self.close()


# Exit codes, beside INTERRUPTED
EXIT_DONE = 0
EXIT_BUG = 1
EXIT_MISTAKE = 2
# Errors for lack of room
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY_MESSAGE = (
    "out of memory: try --gradient_checkpointing, --train_batch_size 1, --mixed_precision bf16 "
    "(fp16 on Nvidia GPUs before Ampere), a smaller --resolution or --base_quantization nf4; "
    "--dry_run estimates the need."
)


def run_to_exit_code(run: Callable[[], int]) -> int:
    """Run, and return the exit code. An error becomes one line; a closed pipe (`| head`) does not
    end the run."""
    processes.enable_expandable_segments()
    with ignore_broken_pipes():
        try:
            return run()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            line = describe_known_error(error)
            if line is None:
                # What nobody foresaw is our bug, and its traceback helps to find it.
                traceback.print_exc()
                return EXIT_BUG
            print(f"error: {escape_control_characters(' '.join(line.split()))}", file=sys.stderr)
            return EXIT_MISTAKE


def describe_known_error(error: Exception) -> str | None:
    """One line for a person's mistake and for an error of the machine (memory, disk, permissions);
    None for any other error."""
    if isinstance(error, UserError):
        return str(error)

    # PyTorch
    if is_out_of_memory(error):
        return OUT_OF_MEMORY_MESSAGE

    # The system, in its own words
    if not isinstance(error, OSError) or not error.strerror:
        return None
    # Of a rename that fails, the second name is the one that the person knows.
    name = error.filename2 or error.filename
    place = f": {name}" if name else ", while a file was written"
    if error.errno in DISK_FULL_ERRNOS:
        return f"{error.strerror}{place}; free some of the disk and resume."
    return f"{error.strerror}{place}."
