"""What is told between two denoising steps of a picture: how far it is, what it will become, and whether to leave."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import PIL.Image
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.errors import StopRequestedError
from dreambooth_moslora.generation import GenerationParams
from dreambooth_moslora.previews import LatentColours, PreviewTracker

__all__ = ["Clock", "Preview", "Step", "Watcher"]


@dataclass(frozen=True)
class Step:
    """After denoising step `step` of `steps` (1-based) of image `index`. `eta_sec` is for all images that remain."""

    index: int
    num_images: int
    step: int
    steps: int
    eta_sec: float


@dataclass(frozen=True)
class Preview:
    """What image `index` will roughly become, in its own size."""

    index: int
    pixels: PIL.Image.Image


class Clock:
    """Time left, from the steps done so far in this call."""

    def __init__(self, params: GenerationParams) -> None:
        self.total_steps = params.steps * params.num_images
        self.started: float | None = None
        self.done = 0

    def tick(self) -> float:
        """Count one step; seconds that remain. The first step only starts the clock: it also pays for warming up."""
        now = time.perf_counter()
        self.done += 1
        if self.started is None:
            self.started = now
            return float("nan")
        return (now - self.started) / (self.done - 1) * (self.total_steps - self.done)


class Watcher:
    """diffusers' `callback_on_step_end`: reports, draws the preview, and leaves the loop when asked to stop."""

    def __init__(
        self,
        index: int,
        params: GenerationParams,
        clock: Clock,
        colours: LatentColours,
        emit: Callable[[Step | Preview], None],
        stop: Callable[[], bool],
    ) -> None:
        self.index, self.params, self.clock = index, params, clock
        self.colours, self.emit, self.stop = colours, emit, stop
        self.tracker: PreviewTracker | None = None

    def __call__(self, pipeline: StableDiffusionXLPipeline, step: int, _timestep: object, tensors: dict) -> dict:
        if self.stop():
            raise StopRequestedError
        params, steps = self.params, len(pipeline.scheduler.timesteps)
        self.emit(Step(self.index, self.clock.total_steps // params.steps, step + 1, steps, self.clock.tick()))
        self.tracker = self.tracker or PreviewTracker(pipeline.scheduler)
        latents = self.tracker.clean_latents(step, tensors["latents"])
        self.emit(Preview(self.index, self.colours(latents, (params.height_px, params.width_px))))
        return {}
