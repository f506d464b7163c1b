"""Trackers (tensorboard, wandb and others): starts them, and logs numbers and samples.

Trackers get no path, prompt or photo. Trackers that show pictures get the samples, which show the subject.
"""

import logging

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.run_files.events import Event, SamplesDrawn, StepDone, StepEvaluated, record_of
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.training.processes import on_main

__all__ = ["TRACKED", "Trackers"]

logger = logging.getLogger(__name__)

TRACKED = (StepDone, StepEvaluated, SamplesDrawn)
"""Events that trackers get."""
PRIVATE_SUFFIXES = ("_dir", "_path", "_prompt", "token", "_name", "_column", "checkpoint")
PICTURE_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Trackers that get the samples, and how they are told that pictures are (N, height, width, RGB)."""


class Trackers:
    """The trackers of `--report_to`. One that fails during the run is dropped."""

    def __init__(self, run_dir: RunDir, accelerator: Accelerator):
        self.run_dir, self.accelerator = run_dir, accelerator

    def start(self, config: TrainConfig) -> None:
        """Open them with the run's plain settings. Raises UserError when one does not open."""
        if self.accelerator.log_with:
            on_main(self.accelerator, lambda: self._open(config))

    def _open(self, config: TrainConfig) -> None:
        try:
            self.accelerator.init_trackers("dreambooth_moslora", config=public_settings(config))
        except Exception as error:  # each tracker raises its own errors
            self.accelerator.trackers.clear()
            said = one_line(f"{type(error).__name__} {error}")
            raise UserError(f"--report_to {config.report_to} cannot start: {said}; none trains without it.") from error

    def log(self, event: StepDone | StepEvaluated | SamplesDrawn) -> None:
        """Log numbers, and samples to trackers that show pictures. A tracker that fails causes one warning."""
        for tracker in list(self.accelerator.trackers):
            try:
                if isinstance(event, SamplesDrawn):
                    self._show(tracker, event)
                else:
                    tracker.log(numbers_of(event), step=event.step)
            except Exception as error:  # each tracker raises its own errors
                self.accelerator.trackers.remove(tracker)
                said = one_line(f"{type(error).__name__} {error}")
                logger.warning("--report_to: %s failed and is not used again in this run: %s", tracker.name, said)

    def _show(self, tracker: GeneralTracker, event: SamplesDrawn) -> None:
        if tracker.name in PICTURE_OPTIONS:
            pictures = np.stack([np.asarray(Image.open(self.run_dir.path / name)) for name in event.files])
            tracker.log_images({"samples": pictures}, step=event.step, **PICTURE_OPTIONS[tracker.name])


def public_settings(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Settings that are plain values and reveal nothing of the user's."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, (bool, int, float, str)) and not key.endswith(PRIVATE_SUFFIXES)
    }


def numbers_of(event: Event) -> dict[str, float]:
    record = record_of(event)
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "time")}
