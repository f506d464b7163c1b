"""Callback between two denoising steps: progress, previews of the image, and stopping.

A preview is a linear map from latents to colours, fitted once to the VAE's decoder. It is computed
only when someone looks at it: copying the latents to the CPU after each step would make the GPU
wait.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

from dreambooth_moslora.base import decode
from dreambooth_moslora.errors import StopRequestedError
from dreambooth_moslora.generation.image_params import GenerationParams, Step

MAX_PREVIEW_PX = 384
FIT_SIDE_LATENTS = 32
"""Side of the latents that the map is fitted on; 1024 pixels determine its 15 numbers."""


class LatentColours:
    """Linear map RGB in [0, 1] = W·latent + b of latents (B, C, h, w) as the UNet sees them, fitted
    by least squares to the VAE's output for smooth random latents."""

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, device: torch.device | str = "cpu") -> None:
        latents = sample_smooth_latents(vae.config.latent_channels)

        # Decode in fp32, as the pipeline does: SDXL's VAE overflows in fp16.
        dtype = vae.dtype
        try:
            vae.to(torch.float32)
            pixels = vae.decode(decode.unscale_latents(vae, latents).to(device)).sample
        finally:
            vae.to(dtype)

        # One row for each latent pixel: its channels and a 1 -> the colour that the VAE gave it
        colours = torch.nn.functional.adaptive_avg_pool2d(pixels.float().cpu(), FIT_SIDE_LATENTS)
        target_rows = colours[0].nan_to_num().flatten(1).T
        self.weight = torch.linalg.lstsq(_add_ones_column(latents), target_rows).solution

    def __call__(self, latents: torch.Tensor, size_px: tuple[int, int]) -> Image.Image:
        """Return the first of `latents` (B, C, h, w) as an image of `size_px` (height, width)."""
        height, width = latents.shape[-2:]
        rows = _add_ones_column(latents[:1].float().cpu()) @ self.weight
        array = ((rows.reshape(height, width, 3) / 2 + 0.5).clamp(0, 1) * 255).byte().numpy()
        return Image.fromarray(array).resize(size_px[::-1], Image.Resampling.BICUBIC)


class PreviewTracker:
    """Estimator of the clean latents after each step.

    Solvers of the DPM++ kind and UniPC keep the model's predictions of x0. Euler keeps x0 + σ·ε, on
    a straight line to x0. For other schedulers the noisy latents are returned.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.predicted: list[torch.Tensor] | None = None
        self.sigmas: torch.Tensor | None = None
        self.previous: torch.Tensor | None = None

        # DPM++ and UniPC keep predictions for their higher order.
        config = scheduler.config
        is_dpmpp = config.get("algorithm_type") in ("dpmsolver++", "sde-dpmsolver++")
        if is_dpmpp or config.get("predict_x0"):
            self.predicted = getattr(scheduler, "model_outputs", None)

        # Euler needs the noise levels, for the line between two steps.
        if type(scheduler).__name__ in ("EulerDiscreteScheduler", "EDMEulerScheduler"):
            self.sigmas = scheduler.sigmas.float().cpu()

    def estimate_clean_latents(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the estimate of x0, of the shape of `latents`, after step `step` (0-based)."""
        if self.predicted is not None:
            return self.predicted[-1].float()
        if self.sigmas is None:
            return latents.float()

        sigma = self.sigmas[step]
        sigma_next = self.sigmas[step + 1]
        latents_fp32 = latents.float()
        previous = self.previous
        self.previous = latents_fp32

        # One point makes no line: after the first step latents are only scaled to unit variance.
        if previous is None or sigma_next == sigma:
            return latents_fp32 / (1 + sigma_next**2).sqrt()

        # Two points on x0 + σ·ε give ε; at σ = 0 the line meets x0.
        return latents_fp32 - sigma_next * (latents_fp32 - previous) / (sigma_next - sigma)


def sample_smooth_latents(channels: int, seed: int = 0) -> torch.Tensor:
    """Return latents (1, channels, 32, 32) of unit variance whose neighbours are similar, as in the
    latents of a photo."""
    generator = torch.Generator().manual_seed(seed)
    side = FIT_SIDE_LATENTS // 4
    coarse = torch.randn(1, channels, side, side, generator=generator)
    return torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="nearest")


def _add_ones_column(latents: torch.Tensor) -> torch.Tensor:
    """Reshape (1, C, h, w) to (h·w, C + 1)."""
    rows = latents[0].flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


@dataclass(frozen=True)
class Preview:
    """View of an unfinished image, computed when `pixels` is read."""

    index: int
    latents: torch.Tensor  # (1, C, h, w), on the device
    size_px: tuple[int, int]  # (height, width)
    colours: LatentColours | None  # None: no previews, as the latents are packed

    @cached_property
    def pixels(self) -> Image.Image:
        """Return the preview in the image's aspect ratio, its longer side at most 384 px."""
        shrink = min(1.0, MAX_PREVIEW_PX / max(self.size_px))
        height, width = (max(1, round(side * shrink)) for side in self.size_px)
        return self.colours(self.latents, (height, width))


class StepClock:
    """Estimator of the remaining time, from the steps of this call."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.started: float | None = None
        self.steps_done = 0

    def tick(self, steps: int) -> float:
        """Count one of an image's `steps`. Return the remaining seconds, or NaN after the first
        step, which includes the warm-up."""
        now = time.perf_counter()
        self.steps_done += 1
        if self.started is None:
            self.started = now
            return float("nan")
        sec_per_step = (now - self.started) / (self.steps_done - 1)
        return sec_per_step * (steps * self.num_images - self.steps_done)


@dataclass
class StepCallback:
    """Callback for diffusers' `callback_on_step_end`: reports progress, offers a preview, and stops
    the loop on request."""

    index: int
    params: GenerationParams
    clock: StepClock
    colours: LatentColours | None  # None: no previews, as the latents are packed
    emit: Callable[[Step | Preview], None]
    stop: Callable[[], bool]
    tracker: PreviewTracker | None = None

    def __call__(
        self, pipeline: StableDiffusionXLPipeline, step: int, _timestep: object, tensors: dict
    ) -> dict:
        if self.stop():
            raise StopRequestedError

        # Report progress. Some solvers take more steps than requested, so count the scheduler's.
        steps = len(pipeline.scheduler.timesteps)
        event = Step(
            index=self.index,
            num_images=self.clock.num_images,
            step=step + 1,
            steps=steps,
            eta_sec=self.clock.tick(steps),
        )
        self.emit(event)

        # Offer the preview.
        if self.colours is None:
            return {}
        self.tracker = self.tracker or PreviewTracker(pipeline.scheduler)
        preview = Preview(
            index=self.index,
            latents=self.tracker.estimate_clean_latents(step, tensors["latents"]),
            size_px=(self.params.height_px, self.params.width_px),
            colours=self.colours,
        )
        self.emit(preview)
        return {}
