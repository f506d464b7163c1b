"""Latents to pictures, and whether a VAE survives half precision: SDXL's own overflows in fp16.

Scaled latents (B, 4, h, w) -> pixels (B, 3, 8h, 8w), about in [-1, 1] -> PIL.

One picture is decoded at a time: at 1024 px SDXL's fp32 decoder needs 3 to 4 GiB for each. If a GPU
has less, the picture is decoded in tiles of 512 px that overlap by a quarter, or of 256 px. Photos
are encoded so too.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dreambooth_moslora.base import machine
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.precision import LIKE_FP32

logger = logging.getLogger(__name__)


def finite_or_black(pixels: torch.Tensor) -> torch.Tensor:
    """The pixels as they are, which become black where they are not finite, with a warning."""
    if not pixels.isfinite().all():
        message = "A picture has values that are not finite (NaN) and is black there: use %s."
        logger.warning(message, LIKE_FP32)
    return pixels


@torch.no_grad()
def decode_pixels(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, 4, h, w) -> pixels (B, 3, 8h, 8w)."""
    found = []
    for one in latents.split(1):
        decode = partial(decoded, vae, one)

        # NaN in the latents is the denoiser's: another precision of the VAE would not help.
        if one.isfinite().all():
            found.append(finite_or_fp32(vae, decode))
        else:
            found.append(decode())
    return torch.cat(found)


def finite_or_fp32(vae: AutoencoderKL, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `work` computes with the VAE. If that is not finite, it is done again in fp32, which the
    VAE then keeps."""
    found = work()
    if not found.isfinite().all() and vae.dtype != torch.float32:
        logger.warning("The VAE gives NaN in %s: it is used in float32 from here on.", vae.dtype)
        vae.to(torch.float32)
        found = work()
    return found


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, 4, h, w) -> pixels (B, 3, 8h, 8w) in fp32, as the VAE computes them."""
    # Undo what the denoiser's latents are scaled by.
    latents = latents.float() / vae.config.scaling_factor
    if statistics := latent_statistics(vae, latents.device):
        mean, deviation = statistics
        latents = latents * deviation + mean

    size_px = [side * scale_of(vae) for side in latents.shape[-2:]]
    device = machine.device_of(vae)
    with tiled_where_short(vae, size_px, device):
        return vae.decode(latents.to(device, vae.dtype)).sample.float()


def latent_statistics(
    vae: AutoencoderKL, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of each latent channel, (1, 4, 1, 1); None for most VAEs."""
    mean = getattr(vae.config, "latents_mean", None)
    deviation = getattr(vae.config, "latents_std", None)
    if mean is None or deviation is None:
        return None
    mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    deviation = torch.tensor(deviation, device=device).view(1, -1, 1, 1)
    return mean, deviation


def scale_of(vae: AutoencoderKL) -> int:
    """Pixels per latent along a side: 8 for SDXL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@contextmanager
def tiled_where_short(
    vae: AutoencoderKL,
    size_px: Sequence[int],
    device: torch.device,
    bytes_a_pixel: int = machine.DECODER_BYTES_A_PIXEL,
) -> Iterator[None]:
    """In this block the VAE works in tiles, if it can, where memory is short for a whole picture.

    vae: whose settings are restored afterwards
    size_px: height and width
    device: where the VAE computes
    bytes_a_pixel: peak of the work beside the weights
    """
    # How many pixels fit into the free memory. On a CPU all of them do.
    free = machine.free_gib(device)
    pixels = math.inf if free is None else free * machine.GIB / bytes_a_pixel
    if math.prod(size_px) <= pixels or not hasattr(vae, "tile_latent_min_size"):
        yield
        return

    # The largest tile that fits, and the smallest where none does.
    fitting = [side for side in machine.TILES_PX if side**2 <= pixels]
    tile = fitting[0] if fitting else machine.TILES_PX[-1]

    before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.use_tiling = True
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = tile // scale_of(vae)
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before


def pictures_of(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W), about in [-1, 1] -> B pictures."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().nan_to_num().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels.cpu()]


@dataclass(frozen=True)
class Probe:
    """How a VAE does in one dtype."""

    dtype: str
    finite: bool  # no NaN and no infinity
    error: float  # mean |difference| from the fp32 picture, of 255 levels


def load_vae_alone(base: Base | str | Path) -> AutoencoderKL:
    """The VAE of a base, or of the base of that name, in fp32. Raises UserError for no base, and
    OSError and ValueError for one without a VAE that can be read."""
    base = Base.find(base)
    if base.file:
        # The configuration is that beside the file; without one diffusers takes the hub's.
        local = {}
        if base.configs is not None:
            local = {"config": str(base.configs), "subfolder": "vae"}
        return AutoencoderKL.from_single_file(str(base.file), **local).eval()
    return AutoencoderKL.from_pretrained(base.place, subfolder="vae").eval()


@torch.no_grad()
def probe_vae(
    vae: AutoencoderKL,
    dtypes: list[torch.dtype],
    photos: list[Image.Image],
    size_px: int,
    device: torch.device,
) -> list[Probe]:
    """Encode and decode in each dtype, and compare with fp32.

    vae: it is in fp32 afterwards
    dtypes: one `Probe` for each
    photos: made square; without any, a chessboard, whose hard edges overflow
    size_px: side of the pictures
    device: where the VAE computes
    """
    # A chessboard of 16 x 16 fields, in place of photos.
    rows, columns = np.indices((size_px, size_px)) // max(1, size_px // 16)
    squares = Image.fromarray(((rows + columns) % 2 * 255).astype(np.uint8)).convert("RGB")
    images = [image.resize((size_px, size_px)) for image in photos] or [squares]

    # Pixels (B, 3, H, W) in [-1, 1].
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1

    exact = round_trip(vae, pixels, torch.float32, device)
    probes = []
    for dtype in dtypes:
        ours = round_trip(vae, pixels, dtype, device)
        finite = bool(ours.isfinite().all())
        error = float("nan")
        if finite:
            error = float((ours - exact).clamp(-2, 2).abs().mean() * 127.5)
        name = str(dtype).removeprefix("torch.")
        probes.append(Probe(dtype=name, finite=finite, error=error))
    vae.to(torch.float32)
    return probes


def round_trip(
    vae: AutoencoderKL, pixels: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Pixels (B, 3, H, W), encoded and decoded one picture after the other: fp32, on the CPU."""
    vae.to(device, dtype)
    found = []
    for picture in pixels:
        latents = vae.encode(picture[None].to(device, dtype)).latent_dist.mode()
        found.append(vae.decode(latents).sample)
    return torch.cat(found).float().cpu()
