"""Tests a VAE in half precision: SDXL's own overflows in fp16 and gives black pictures, or NaN to train on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dreambooth_moslora.base.locate import configs_beside

__all__ = ["Probe", "load_vae_alone", "probe_vae"]


@dataclass(frozen=True)
class Probe:
    """`finite`: no NaN and no infinity. `error`: mean |difference| from the fp32 picture, of 255 levels."""

    dtype: str
    finite: bool
    error: float


def load_vae_alone(source: str | Path) -> AutoencoderKL:
    """The VAE of a base, in fp32, from a diffusers folder, a hub id, or a single file."""
    path = Path(source)
    if path.is_file():
        configs = configs_beside(path)
        local = {} if configs is None else {"config": str(configs), "subfolder": "vae"}
        return AutoencoderKL.from_single_file(str(path), **local).eval()
    return AutoencoderKL.from_pretrained(source, subfolder="vae").eval()


def stress_pixels(photos: list[Image.Image], size_px: int) -> torch.Tensor:
    """(N, 3, size, size) in [-1, 1]: the photos, or hard edges in full contrast, which overflow first."""
    rows, columns = np.indices((size_px, size_px)) // max(1, size_px // 16)
    squares = ((rows + columns) % 2 * 255).astype(np.uint8)
    images = [image.resize((size_px, size_px)) for image in photos] or [Image.fromarray(squares).convert("RGB")]
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def probe_vae(
    vae: AutoencoderKL, dtypes: list[torch.dtype], photos: list[Image.Image], size_px: int, device: torch.device
) -> list[Probe]:
    """Encode and decode in each dtype, compared with fp32. The VAE is left in fp32."""
    pixels = stress_pixels(photos, size_px)
    exact = round_trip(vae, pixels, torch.float32, device)
    probes = [judged(round_trip(vae, pixels, dtype, device), exact, dtype) for dtype in dtypes]
    vae.to(torch.float32)
    return probes


def round_trip(vae: AutoencoderKL, pixels: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    vae.to(device, dtype)
    decoded = [vae.decode(vae.encode(p[None].to(device, dtype)).latent_dist.mode()).sample for p in pixels]
    return torch.cat(decoded).float().cpu()


def judged(pixels: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> Probe:
    finite = bool(pixels.isfinite().all())
    error = float((pixels - exact).clamp(-2, 2).abs().mean() * 127.5) if finite else float("nan")
    return Probe(str(dtype).removeprefix("torch."), finite, error)
