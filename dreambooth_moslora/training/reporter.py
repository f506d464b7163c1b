"""What a run says while it runs: each event to `metrics.jsonl`, to the caller, and to the trackers.

Only the main process speaks. Nothing that leaves the machine through a tracker holds a path, a prompt or a photo; the
samples, which are pictures of the subject, go to trackers that show pictures.
"""

import gc
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.events import (
    AdapterExported,
    Event,
    PhaseProgress,
    RunEnded,
    SamplesDrawn,
    StepDone,
    StepEvaluated,
    record_of,
)
from dreambooth_moslora.core.process import peak_memory_gib
from dreambooth_moslora.core.run_folder import RunDir, atomic_write
from dreambooth_moslora.training.accelerator import on_main

__all__ = ["Reporter", "Stopwatch", "free_unused_memory", "memory_gib"]

logger = logging.getLogger(__name__)

PRIVATE_SUFFIXES = ("_dir", "_path", "_prompt", "token", "_name", "_column", "checkpoint")
TRACKED = (StepDone, StepEvaluated, SamplesDrawn)
ENDINGS = (RunEnded.kind, AdapterExported.kind)
PICTURE_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Trackers that get the samples, and how they are told that pictures are (N, height, width, RGB)."""


class Reporter:
    """Call it with each event. `on_event` gets the event that the file gets.

    The file may be of an earlier run: until `begin_at` it is left alone, and events wait. `step` is where the run is.
    """

    def __init__(self, run_dir: RunDir, accelerator: Accelerator, on_event: Callable[[Event], None] | None):
        self.run_dir, self.accelerator, self.on_event = run_dir, accelerator, on_event
        self.step = 0
        self._waiting: list[Event] | None = []

    def __call__(self, event: Event) -> None:
        if not self.accelerator.is_main_process:
            return
        if not getattr(event, "skipped", False):
            self.step = getattr(event, "step", self.step)
        self._write(event)
        if self.on_event is not None:
            self.on_event(event)
        if isinstance(event, TRACKED):
            self._track(event)

    def phase(self, phase: str, done: int = 0, total: int = 1) -> None:
        self(PhaseProgress(phase, done, total))

    def counted(self, phase: str, counts: Iterable[int], total: int) -> Iterator[int]:
        """Report each count of a phase as it comes, at most four a second, the first and the last always."""
        self.phase(phase, 0, total)
        last = time.monotonic()
        for done in counts:
            if done == total or time.monotonic() - last > 0.25:
                self.phase(phase, done, total)
                last = time.monotonic()
            yield done

    def begin_at(self, step: int) -> None:
        """Events of steps that will be done again, and of the end that was not, leave the file."""
        if not self.accelerator.is_main_process:
            return
        known = self.run_dir.read_metrics() if step else []
        kept = [e for e in known if e.get("step", 0) <= step and e["type"] not in ENDINGS]
        atomic_write(self.run_dir.metrics_path, "".join(json.dumps(event) + "\n" for event in kept))
        self.release()

    def release(self) -> None:
        """Write the events that waited, and from now on each at once."""
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

    def start_trackers(self, config: TrainConfig) -> None:
        """Open tensorboard and its like with the run's plain numbers. Raises UserError for one that does not open."""
        facts = {
            key: value
            for key, value in config.to_dict().items()
            if isinstance(value, (bool, int, float, str)) and not key.endswith(PRIVATE_SUFFIXES)
        }

        def start() -> None:
            try:
                self.accelerator.init_trackers("dreambooth_moslora", config=facts)
            except Exception as error:  # each tracker has its own kinds
                self.accelerator.trackers.clear()
                said = one_line(f"{type(error).__name__} {error}")
                raise UserError(f"--report_to {config.report_to} cannot start: {said}; none trains without.") from error

        if self.accelerator.log_with:
            on_main(self.accelerator, start)

    def _track(self, event: StepDone | StepEvaluated | SamplesDrawn) -> None:
        """Numbers, and the samples where pictures are taken. A tracker that fails is said, and gets no more."""
        for tracker in list(self.accelerator.trackers):
            try:
                if isinstance(event, SamplesDrawn):
                    self._show(tracker, event)
                else:
                    tracker.log(numbers_of(event), step=event.step)
            except Exception as error:  # each tracker has its own kinds
                self.accelerator.trackers.remove(tracker)
                said = one_line(f"{type(error).__name__} {error}")
                logger.warning("--report_to: %s fails and gets no more of this run: %s", tracker.name, said)

    def _show(self, tracker: GeneralTracker, event: SamplesDrawn) -> None:
        if tracker.name in PICTURE_OPTIONS:
            pictures = np.stack([np.asarray(Image.open(self.run_dir.path / name)) for name in event.files])
            tracker.log_images({"samples": pictures}, step=event.step, **PICTURE_OPTIONS[tracker.name])


def numbers_of(event: Event) -> dict[str, float]:
    record = record_of(event)
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "time")}


class Stopwatch:
    """Seconds a step (median of the last 20) and what remains; the first step after a start is slower than the rest."""

    def __init__(self):
        self._seconds: deque[float] = deque(maxlen=20)
        self._started = time.monotonic()

    def restart(self) -> None:
        """Begin a step: what was done since the last one (samples, saving) is no training time."""
        self._started = time.monotonic()

    def lap(self, remaining_steps: int) -> tuple[float, float]:
        """(seconds of the step that ends now, estimated seconds of the remaining ones)."""
        seconds = time.monotonic() - self._started
        self._seconds.append(seconds)
        return seconds, median(self._seconds) * remaining_steps


def free_unused_memory(device: torch.device) -> None:
    """Give back the GPU memory of pictures: the blocks of a decode fit no training step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_gib(device: torch.device) -> float | None:
    """Peak memory so far: what PyTorch has reserved of the GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_memory_gib()
