"""Cheap pictures of half-denoised latents: no VAE in the loop.

With x = x0 + σ·ε, an Euler step moves along d = ε, so two consecutive latents give the clean image that the model has
in mind: x0 = x' - σ'·d, d = (x' - x) / (σ' - σ). A linear map, fitted once to the base's own VAE, makes it colours.
"""

import logging

import torch
from diffusers import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

from dreambooth_moslora.errors import one_line

__all__ = ["LatentColours", "PreviewTracker"]

logger = logging.getLogger(__name__)

FIT_SIDE = 32
"""Side of the latents that the map is fitted on; 1024 pixels determine its 15 numbers."""


class LatentColours:
    """RGB = W·latent + b, fitted by least squares to what the VAE makes of smooth random latents.

    Latents are as the UNet sees them: (B, 4, h, w), scaled by the VAE's factor. Pixels lie in [0, 1]. Where
    no map can be fitted to the VAE, previews are grey: they are no reason to lose the picture.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        latents = smooth_latents(vae.config.latent_channels)
        self.weight = torch.zeros(vae.config.latent_channels + 1, 3)
        try:
            colours = colours_of(vae, latents)
        except RuntimeError as error:  # out of memory, for one
            logger.warning("previews are grey: the VAE could not decode: %s", one_line(error))
            return
        if colours.isfinite().all():
            self.weight = torch.linalg.lstsq(_with_ones(latents), _pixels_as_rows(colours)).solution
        else:
            logger.warning("previews are grey: the VAE gives values that are not finite (NaN)")

    def __call__(self, latents: Tensor, size_px: tuple[int, int]) -> Image.Image:
        """The first of `latents` (B, 4, h, w) as a picture of `size_px` (height, width)."""
        height, width = latents.shape[-2:]
        rows = _with_ones(latents[:1].float().cpu()) @ self.weight
        array = ((rows.reshape(height, width, 3) / 2 + 0.5).clamp(0, 1) * 255).byte().numpy()
        return Image.fromarray(array).resize(size_px[::-1], Image.Resampling.BICUBIC)


class PreviewTracker:
    """Follows one denoising run and says after each step what the clean latents would be."""

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.sigmas = scheduler.sigmas.float().cpu()
        self.is_unit_variance = not _is_sigma_space(scheduler)
        self.previous: Tensor | None = None

    def clean_latents(self, step: int, latents: Tensor) -> Tensor:
        """`latents` after step `step` (0-based) -> estimate of x0, same shape."""
        sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
        x = latents.float().cpu()
        if self.is_unit_variance:
            x = x * (1 + sigma_next**2).sqrt()
        before, self.previous = self.previous, x
        if before is None or sigma_next == sigma:
            return x / (1 + sigma_next**2).sqrt()
        return x - sigma_next * (x - before) / (sigma_next - sigma)


def _is_sigma_space(scheduler: SchedulerMixin) -> bool:
    """Euler keeps x0 + σ·ε; the others keep the variance near one, α·x0 + σ·α·ε with α = 1/sqrt(1 + σ²)."""
    return float(scheduler.init_noise_sigma) != 1.0


@torch.no_grad()
def colours_of(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents (1, C, 32, 32) -> what the VAE makes of them, (1, 3, 32, 32) about in [-1, 1].

    In fp32, as the pipeline decodes: SDXL's own VAE overflows in fp16. The VAE is as it was afterwards.
    """
    dtype = vae.dtype
    try:
        vae.to(torch.float32)
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.device)).sample
    finally:
        vae.to(dtype)
    return torch.nn.functional.adaptive_avg_pool2d(pixels.float().cpu(), FIT_SIDE)


def smooth_latents(channels: int, seed: int = 0) -> Tensor:
    """(1, channels, 32, 32) of unit variance whose neighbours resemble each other, as in a real picture's latents."""
    coarse = torch.randn(1, channels, FIT_SIDE // 4, FIT_SIDE // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="nearest")


def _pixels_as_rows(image: Tensor) -> Tensor:
    """(1, C, h, w) -> (h·w, C)."""
    return image[0].flatten(1).T


def _with_ones(latents: Tensor) -> Tensor:
    rows = _pixels_as_rows(latents)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
