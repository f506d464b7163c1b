"""Training events as lines and bars in the terminal, with the remaining time."""

import sys
from typing import TextIO

from tqdm import tqdm

from dreambooth_moslora.core.run_files.events import (
    CheckpointSaved,
    Event,
    PhaseProgress,
    RunEnded,
    RunStarted,
    SamplesDrawn,
    ScaleFound,
    StepDone,
    StepEvaluated,
)

__all__ = ["TerminalProgress"]

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
PLAIN_INTERVAL_SEC = 5.0
"""Seconds between two lines of progress when the output is a file."""


class TerminalProgress:
    """Call it with each event of `training.loop.train`. `stream` may be a terminal or a file."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total_steps = 0
        self._bar: tqdm | None = None
        self._phase = ""

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""

    def write(self, line: str) -> None:
        tqdm.write(line, file=self.stream)

    def _open(self, title: str, total: int, start: int, unit: str) -> None:
        self.close()
        interval = 0.2 if self.stream.isatty() else PLAIN_INTERVAL_SEC
        self._bar = tqdm(
            total=total, initial=start, desc=title, unit=unit, file=self.stream, mininterval=interval, maxinterval=60.0
        )
        self._phase = title

    def _on_start(self, event: RunStarted) -> None:
        self.total_steps = event.max_train_steps

    def _on_phase(self, event: PhaseProgress) -> None:
        title = PHASE_TITLES.get(event.phase)
        if title is None:
            return
        total, done = event.total, event.done
        if total <= 1:
            if not self._training or event.phase == "exporting":
                self.close()
                self.write(f"{title} …")
            return
        if self._phase != title:
            self._open(title, total, done, "step" if event.phase == "sampling" else "image")
        self._advance(done)

    @property
    def _training(self) -> bool:
        return self._phase == "training"

    def _on_step(self, event: StepDone) -> None:
        if not self._training:
            self._open("training", self.total_steps, event.step - 1, "step")
        shown = {"loss": f"{event.loss:.4f}", "lr": f"{event.lr:.2g}"}
        if event.loss_prior is not None:
            shown |= {"instance": f"{event.loss_instance:.4f}", "prior": f"{event.loss_prior:.4f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._advance(event.step)

    def _advance(self, done: int) -> None:
        self._bar.update(done - self._bar.n)
        if done >= (self._bar.total or 0):
            self.close()

    def _on_checkpoint(self, event: CheckpointSaved) -> None:
        self.write(f"step {event.step}: checkpoint {event.path}")

    def _on_sample(self, event: SamplesDrawn) -> None:
        self.write(f"step {event.step}: {len(event.files)} sample images")

    def _on_evaluation(self, event: StepEvaluated) -> None:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in event.scores.items())
        self.write(f"step {event.step}: {scores}")

    def _on_scale(self, event: ScaleFound) -> None:
        self.write(f"best scale: {event.best:g}, usable from {event.low:g} to {event.high:g}")

    def _on_end(self, event: RunEnded) -> None:
        self.close()
