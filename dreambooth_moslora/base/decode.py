"""Decode latents to images.

Scaled latents (B, C, h, w) -> pixels (B, 3, 8h, 8w), about in [0, 1] -> PIL.

Images are decoded one by one: at 1024 px SDXL's fp32 decoder needs 3 to 4 GiB for each. If a GPU
has less, an image is decoded in tiles of 512 px that overlap by a quarter, or of 256 px. Photos are
encoded in the same way.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import AutoencoderKL
from PIL import Image

from dreambooth_moslora.base import devices
from dreambooth_moslora.precision import FP16_OVERFLOW_ADVICE
from dreambooth_moslora.settings.family_facts import SDXL

logger = logging.getLogger(__name__)


def warn_nonfinite_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Return the pixels unchanged, and warn if any is not finite, which becomes black."""
    if not pixels.isfinite().all():
        logger.warning(
            "An image has values that are not finite (NaN) and is black there: use %s.",
            FP16_OVERFLOW_ADVICE,
        )
    return pixels


@torch.no_grad()
def decode_pixels(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels (B, 3, 8h, 8w), about in [0, 1], of scaled latents (B, C, h, w).

    An fp16 VAE whose configuration has `force_upcast`, as SDXL's, decodes in fp32 and returns to
    fp16 afterwards.
    """
    is_upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if is_upcast:
        vae.float()

    # Decode one image after the other.
    pixels = []
    for image_latents in latents.split(1):
        decode = partial(decode_latents, vae, image_latents)

        # If the denoiser gave NaN, a VAE in fp32 would not help.
        is_finite = bool(image_latents.isfinite().all())
        pixels.append(run_with_fp32_fallback(vae, decode) if is_finite else decode())
    if is_upcast:
        vae.half()
    return torch.cat(pixels) / 2 + 0.5


def run_with_fp32_fallback(vae: AutoencoderKL, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the result of `work`, which uses the VAE. If it is not finite, convert the VAE to fp32
    for good and run `work` again."""
    result = work()
    if not result.isfinite().all() and vae.dtype != torch.float32:
        logger.warning("The VAE gives NaN in %s: it is used in float32 from here on.", vae.dtype)
        vae.to(torch.float32)
        result = work()
    return result


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents (B, C, h, w) to the VAE's pixels (B, 3, 8h, 8w), about in [-1, 1],
    fp32."""
    latents = unscale_latents(vae, latents)
    size_px = [side * get_pixels_per_latent(vae) for side in latents.shape[-2:]]
    device = devices.get_device(vae)
    with enable_tiling(vae, size_px, device):
        return vae.decode(latents.to(device, vae.dtype)).sample.float()


def unscale_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Convert the denoiser's latents to those that the VAE decodes, of the same shape, fp32."""
    mean, deviation = get_latent_statistics(vae, latents.device)
    return latents.float() / vae.config.scaling_factor * deviation + mean


def get_latent_statistics(
    vae: AutoencoderKL, device: torch.device
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Return mean and standard deviation of each latent channel, (1, C, 1, 1); 0 and 1 for a VAE
    that does not state them, as most."""
    mean = getattr(vae.config, "latents_mean", None)
    deviation = getattr(vae.config, "latents_std", None)
    if mean is None or deviation is None:
        return 0.0, 1.0
    mean, deviation = torch.tensor([mean, deviation], device=device).view(2, 1, -1, 1, 1)
    return mean, deviation


def get_pixels_per_latent(vae: AutoencoderKL) -> int:
    """Return the pixels per latent along a side: 8 for SDXL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


TILING_ATTRIBUTES = (
    "use_slicing",
    "use_tiling",
    "tile_sample_min_size",
    "tile_latent_min_size",
)
"""Attributes of a VAE that make it compute image by image and in tiles, and, of SDXL's kind, the
tiles' sides."""


@contextmanager
def enable_tiling(
    vae: torch.nn.Module,
    size_px: Sequence[int],
    device: torch.device,
    bytes_per_pixel: int = SDXL.decoder_bytes_per_pixel,
) -> Iterator[None]:
    """Let the VAE compute image by image within the block, and in tiles if memory is short for a
    whole image. A VAE that cannot do so stays as it is.

    size_px: height and width of an image
    device: on which the VAE computes
    bytes_per_pixel: peak memory beside the weights
    """
    # Compute how many pixels fit into the free memory: on a CPU, all.
    free = devices.measure_free_gib(device)
    pixels = math.inf if free is None else free * devices.GIB / bytes_per_pixel
    before = {name: getattr(vae, name) for name in TILING_ATTRIBUTES if hasattr(vae, name)}
    if not before:
        yield
        return

    # Choose the largest tile that fits, or else the smallest. VAEs of other kinds, such as
    # Qwen-Image's, have tiles of a fixed 256 px.
    vae.use_slicing = True
    if math.prod(size_px) > pixels:
        fitting = (side for side in devices.TILES_PX if side**2 <= pixels)
        tile = next(fitting, devices.TILES_PX[-1])
        vae.use_tiling = True
        if "tile_latent_min_size" in before:
            vae.tile_sample_min_size = tile
            vae.tile_latent_min_size = tile // get_pixels_per_latent(vae)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert pixels (B, 3, H, W), about in [0, 1], to B images."""
    levels = (pixels.clamp(0, 1) * 255).round().nan_to_num().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels.cpu()]
