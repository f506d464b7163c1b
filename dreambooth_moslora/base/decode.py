"""Latents to pictures.

Scaled latents (B, C, h, w) -> pixels (B, 3, 8h, 8w), about in [0, 1] -> PIL.

One picture is decoded at a time: at 1024 px SDXL's fp32 decoder needs 3 to 4 GiB for each. If a GPU
has less, the picture is decoded in tiles of 512 px that overlap by a quarter, or of 256 px. Photos
are encoded so too.
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
    """The pixels as they are, which become black where they are not finite, with a warning."""
    if not pixels.isfinite().all():
        message = "A picture has values that are not finite (NaN) and is black there: use %s."
        logger.warning(message, FP16_OVERFLOW_ADVICE)
    return pixels


@torch.no_grad()
def decode_pixels(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels (B, 3, 8h, 8w), about in [0, 1], of scaled latents (B, C, h, w).

    A VAE in fp16 whose configuration says `force_upcast`, as SDXL's, decodes in fp32, and is in
    fp16 again afterwards.
    """
    is_upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if is_upcast:
        vae.float()

    # One picture after the other
    pixels = []
    for one in latents.split(1):
        decode = partial(decode_latents, vae, one)

        # NaN in the latents is the denoiser's: another precision of the VAE would not help.
        if one.isfinite().all():
            pixels.append(run_with_fp32_fallback(vae, decode))
        else:
            pixels.append(decode())
    if is_upcast:
        vae.half()
    return torch.cat(pixels) / 2 + 0.5


def run_with_fp32_fallback(vae: AutoencoderKL, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `work` computes with the VAE. If that is not finite, it is done again in fp32, which the
    VAE then keeps."""
    found = work()
    if not found.isfinite().all() and vae.dtype != torch.float32:
        logger.warning("The VAE gives NaN in %s: it is used in float32 from here on.", vae.dtype)
        vae.to(torch.float32)
        found = work()
    return found


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, 8h, 8w), about in [-1, 1], in fp32, as the VAE
    computes them."""
    latents = unscale_latents(vae, latents)
    size_px = [side * get_pixels_per_latent(vae) for side in latents.shape[-2:]]
    device = devices.get_device(vae)
    with enable_tiling(vae, size_px, device):
        return vae.decode(latents.to(device, vae.dtype)).sample.float()


def unscale_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the denoiser sees them -> as the VAE decodes them, the same shape, in fp32."""
    latents = latents.float() / vae.config.scaling_factor
    if statistics := get_latent_statistics(vae, latents.device):
        mean, deviation = statistics
        latents = latents * deviation + mean
    return latents


def get_latent_statistics(
    vae: AutoencoderKL, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of each latent channel, (1, C, 1, 1); None for most VAEs."""
    mean = getattr(vae.config, "latents_mean", None)
    deviation = getattr(vae.config, "latents_std", None)
    if mean is None or deviation is None:
        return None
    mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    deviation = torch.tensor(deviation, device=device).view(1, -1, 1, 1)
    return mean, deviation


def get_pixels_per_latent(vae: AutoencoderKL) -> int:
    """Pixels per latent along a side: 8 for SDXL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


TILING_ATTRIBUTES = (
    "use_slicing",
    "use_tiling",
    "tile_sample_min_size",
    "tile_latent_min_size",
)
"""How a VAE is told to work on one picture after the other, and in tiles, and the sides of those of
SDXL's kind."""


@contextmanager
def enable_tiling(
    vae: torch.nn.Module,
    size_px: Sequence[int],
    device: torch.device,
    bytes_per_pixel: int = SDXL.decoder_bytes_per_pixel,
) -> Iterator[None]:
    """In this block the VAE works on one picture at a time, if it can, and in tiles where memory is
    short for a whole one.

    vae: whose settings are restored afterwards
    size_px: height and width
    device: where the VAE computes
    bytes_per_pixel: peak of the work beside the weights
    """
    # How many pixels fit into the free memory. On a CPU all of them do.
    free = devices.measure_free_gib(device)
    pixels = math.inf if free is None else free * devices.GIB / bytes_per_pixel
    before = {name: getattr(vae, name) for name in TILING_ATTRIBUTES if hasattr(vae, name)}
    if not before:
        yield
        return

    # The largest tile that fits, and the smallest where none does. VAEs of other kinds, such as
    # Qwen-Image's, have tiles of their own, of 256 px.
    vae.use_slicing = True
    if math.prod(size_px) > pixels:
        fitting = [side for side in devices.TILES_PX if side**2 <= pixels]
        tile = fitting[0] if fitting else devices.TILES_PX[-1]
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
    """Pixels (B, 3, H, W), about in [0, 1] -> B pictures."""
    levels = (pixels.clamp(0, 1) * 255).round().nan_to_num().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels.cpu()]
