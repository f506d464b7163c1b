"""Reports a run's events: to `metrics.jsonl`, to the caller, and to the trackers.

Only the main process reports.
"""

import gc
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median

import torch
from accelerate import Accelerator

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.process import peak_memory_gib
from dreambooth_moslora.core.run_files.events import (
    AdapterExported,
    Event,
    PhaseProgress,
    RunEnded,
    ScaleFound,
    record_of,
)
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.training.results.trackers import TRACKED, Trackers

__all__ = ["Reporter", "Stopwatch", "free_unused_memory", "memory_gib"]

ENDINGS = (RunEnded.kind, AdapterExported.kind, ScaleFound.kind)


class Reporter:
    """Call it with each event. `on_event` gets the same events as the file.

    The file may belong to an earlier run: events wait until `begin_at`. `step` is the run's latest step.

    One process raises the error of a report that fails. Of several, the main one keeps it until all meet, and
    `raise_failure` then raises it: alone it would leave the others waiting.
    """

    def __init__(self, run_dir: RunDir, accelerator: Accelerator, on_event: Callable[[Event], None] | None):
        self.run_dir, self.accelerator, self.on_event = run_dir, accelerator, on_event
        self.step = 0
        self.trackers = Trackers(run_dir, accelerator)
        self.failure: Exception | None = None
        self._waiting: list[Event] | None = []

    def __call__(self, event: Event) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            self._report(event)
        except Exception as error:
            if self.accelerator.num_processes == 1:
                raise
            self.failure = self.failure or error

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _report(self, event: Event) -> None:
        if not getattr(event, "skipped", False):
            self.step = getattr(event, "step", self.step)
        self._write(event)
        if self.on_event is not None:
            self.on_event(event)
        if isinstance(event, TRACKED):
            self.trackers.log(event)

    def phase(self, phase: str, done: int = 0, total: int = 1) -> None:
        self(PhaseProgress(phase, done, total))

    def counted(self, phase: str, counts: Iterable[int], total: int) -> Iterator[int]:
        """Report each count of a phase, at most four times a second, and always the first and the last."""
        self.phase(phase, 0, total)
        last = time.monotonic()
        for done in counts:
            if done == total or time.monotonic() - last > 0.25:
                self.phase(phase, done, total)
                last = time.monotonic()
            yield done

    def counter(self, phase: str, total: int) -> Callable[[], object]:
        """Like `counted`, without a loop: call the returned function at each count."""
        counts = self.counted(phase, range(1, total + 1), total)
        return lambda: next(counts, None)

    def begin_at(self, step: int) -> None:
        """Remove from the file the events of steps that will be repeated, and of the earlier end; then write."""
        if not self.accelerator.is_main_process:
            return
        known = self.run_dir.read_metrics() if step else []
        kept = [e for e in known if e.get("step", 0) <= step and e["type"] not in ENDINGS]
        atomic_write(self.run_dir.metrics_path, "".join(json.dumps(event) + "\n" for event in kept))
        self.release()

    def release(self) -> None:
        """Write the events that waited; from now on events are written at once."""
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            self._write(event)

    @property
    def has_begun(self) -> bool:
        return self._waiting is None

    def _write(self, event: Event) -> None:
        if self._waiting is None:
            self.run_dir.append_metrics(record_of(event))
        else:
            self._waiting.append(event)


class Stopwatch:
    """Seconds per step (median of the last 20) and the remaining time."""

    def __init__(self):
        self._seconds: deque[float] = deque(maxlen=20)
        self._started = time.monotonic()

    def restart(self) -> None:
        """Start a step: the time since the last one (samples, saving) does not count."""
        self._started = time.monotonic()

    def lap(self, remaining_steps: int) -> tuple[float, float]:
        """(seconds of the step that ends now, estimated seconds of the remaining ones)."""
        seconds = time.monotonic() - self._started
        self._seconds.append(seconds)
        return seconds, median(self._seconds) * remaining_steps


def free_unused_memory(device: torch.device) -> None:
    """Free the GPU memory of pictures: the blocks of a decode do not fit a training step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_gib(device: torch.device) -> float | None:
    """Peak memory so far, GiB: reserved by PyTorch on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_memory_gib()
