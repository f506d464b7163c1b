"""Reports a run's events: to `metrics.jsonl`, to the caller, and to the trackers (tensorboard,
wandb and others).

Only the main process reports. Trackers get no path, prompt or photo; those that show images get
the samples, which show the subject. `RunContext` is what every part of a run shares.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.errors import StopRequestedError, UserError, format_error
from dreambooth_moslora.plan.distributed import reduce_any, run_on_each
from dreambooth_moslora.settings.setting_names import SETTINGS
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

TRACKED_EVENTS = (events.StepDone, events.StepEvaluated, events.SamplesSaved)
IMAGE_TRACKER_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Trackers that get the samples, and how they are told that images are (N, height, width, RGB).
"""
END_KINDS = (events.RunEnded.kind, events.AdapterExported.kind)
"""Events of a run's end, which a resumed run takes back."""


@dataclass(eq=False)
class Reporter:
    """Reports a run's events. Call it with each.

    run_dir: whose `metrics.jsonl` is written
    accelerator: the processes, and the trackers
    on_event: gets every event too
    step: the latest
    failure: an error of reporting, among several processes
    earlier_curves: tensorboard's files in the run folder from before it opened
    pending_events: events that are not written yet; None once they are written at once

    The file may be an earlier run's, so events wait until `begin_from_step`. Of several processes
    the main one keeps an error until all meet, and `raise_failure` then raises it: alone it would
    leave the others waiting.
    """

    run_dir: run_folder.RunDir
    accelerator: Accelerator
    on_event: Callable[[events.Event], None] | None
    step: int = 0
    failure: Exception | None = None
    earlier_curves: list[Path] = field(default_factory=list)
    pending_events: list[events.Event] | None = field(default_factory=list)

    def __call__(self, event: events.Event) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            # A skipped step was not taken: its number comes again.
            if not getattr(event, "skipped", False):
                self.step = getattr(event, "step", self.step)

            # The file, the caller, the trackers.
            if self.pending_events is None:
                self.run_dir.record_event(events.build_record(event))
            else:
                self.pending_events.append(event)
            if self.on_event is not None:
                self.on_event(event)
            if isinstance(event, TRACKED_EVENTS):
                self._track(event)
        except Exception as error:
            if self.accelerator.num_processes == 1:
                raise
            self.failure = self.failure or error

    def start_trackers(self, config: TrainConfig) -> None:
        """Open the trackers, with settings that cannot hold text of the user's. Raises UserError if
        one does not open."""
        # Numbers, switches and choices: no path and no prompt.
        public = {}
        for name, value in config.to_dict().items():
            is_choice = isinstance(value, str) and SETTINGS[name].metadata["choices"]
            if isinstance(value, (bool, int, float)) or is_choice:
                public[name] = value

        # Curves of an earlier run in this folder are moved away with it; others are not ours.
        home = self.run_dir.path
        curves = sorted((home / config.logging_dir).rglob("*.tfevents.*"))
        self.earlier_curves = [
            path for path in curves if path.resolve().is_relative_to(home.resolve())
        ]

        try:
            self.accelerator.init_trackers("dreambooth_moslora", config=public)
        except Exception as error:  # each tracker raises its own errors
            self.accelerator.trackers.clear()
            reason = format_error(f"{type(error).__name__} {error}")
            raise UserError(
                f"--report_to {config.report_to} cannot start: {reason}; none trains without it."
            ) from error

    def _track(self, event: events.StepDone | events.StepEvaluated | events.SamplesSaved) -> None:
        """Log numbers, and samples to trackers that show images. A tracker that fails causes one
        warning."""
        for tracker in list(self.accelerator.trackers):
            try:
                if not isinstance(event, events.SamplesSaved):
                    tracker.log(collect_numbers(event), step=event.step)
                elif tracker.name in IMAGE_TRACKER_OPTIONS:
                    paths = [self.run_dir.path / name for name in event.files]
                    images = np.stack([np.asarray(Image.open(path)) for path in paths])
                    options = IMAGE_TRACKER_OPTIONS[tracker.name]
                    tracker.log_images({"samples": images}, step=event.step, **options)
            except Exception as error:  # each tracker raises its own errors
                self.accelerator.trackers.remove(tracker)
                reason = format_error(f"{type(error).__name__} {error}")
                logger.warning(
                    "--report_to: %s failed and is not used again in this run: %s",
                    tracker.name,
                    reason,
                )

    def end_trackers(self) -> None:
        """Close the trackers. Their errors are only logged, so that they do not hide the run's
        result or error."""
        try:
            self.accelerator.end_training()
        except Exception as error:  # each tracker raises its own errors
            reason = format_error(f"{type(error).__name__} {error}")
            logger.warning("--report_to: ending it failed: %s", reason)

    def raise_failure(self) -> None:
        """Raise the error that was kept, if there is one."""
        if self.failure is not None:
            raise self.failure

    def report_phase(self, phase: str, done: int = 0, total: int = 1) -> None:
        """Report how much of a phase is done."""
        self(events.PhaseProgress(phase, done, total))

    def report_counts(self, phase: str, counts: Iterable[int], total: int) -> Iterator[int]:
        """Report each count of a phase, at most four times a second, and always the first and the
        last."""
        # Every report is a line of the file.
        self.report_phase(phase, 0, total)
        last = time.monotonic()
        for done in counts:
            if done == total or time.monotonic() - last > 0.25:
                self.report_phase(phase, done, total)
                last = time.monotonic()
            yield done

    def begin_from_step(self, step: int) -> None:
        """Remove from the file the events of steps that will be repeated, and of the earlier end;
        then write."""
        if not self.accelerator.is_main_process:
            return

        # A run from step 0 keeps nothing: its file is of a run that failed here.
        lines = [
            json.dumps(event) + "\n"
            for event in (self.run_dir.read_events() if step else [])
            if event.get("step", 0) <= step and event["type"] not in END_KINDS
        ]
        write_atomic(self.run_dir.metrics_path, "".join(lines))
        self.write_pending()

    def write_pending(self) -> None:
        """Write the events that waited; from now on events are written at once."""
        waiting = self.pending_events or []
        self.pending_events = None
        for event in waiting:
            self.run_dir.record_event(events.build_record(event))


def collect_numbers(event: events.StepDone | events.StepEvaluated) -> dict[str, float]:
    """Return the event's numbers by name, without its step and its time."""
    return {
        name: value
        for name, value in events.build_record(event).items()
        if isinstance(value, (int, float)) and name not in ("step", "time")
    }


@dataclass(frozen=True)
class RunContext:
    """Folder, processes, reporter and stop signal that every part of a run shares. `should_stop`
    tells whether this process was asked to stop."""

    run_dir: run_folder.RunDir
    accelerator: Accelerator
    report: Reporter
    should_stop: Callable[[], bool]

    def is_stop_requested(self) -> bool:
        """Return whether any process was asked to stop; raise if one failed to report. All must
        call it together."""
        ends = reduce_any(self.accelerator, self.report.failure is not None or self.should_stop())
        if ends:
            run_on_each(self.accelerator, self.report.raise_failure)
        return ends

    def raise_if_stop_requested(self) -> None:
        """Raise StopRequestedError, on all processes together."""
        if self.is_stop_requested():
            raise StopRequestedError

    def raise_if_local_stop(self) -> None:
        """Raise StopRequestedError when this process was asked to stop: for work whose errors all
        processes hear."""
        if self.should_stop():
            raise StopRequestedError
