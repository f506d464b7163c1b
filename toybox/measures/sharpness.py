"""Measure how sharp a toy is in a picture: the energy of its finest details.

The mean square of the two finest levels of a Laplacian pyramid (Burt and Adelson, 1983), over the
toy's pixels: for 128 px, details of about 1 to 4 px. Compare with the autoencoder's reconstructions
of true renders, which no picture of the base can exceed by much.
"""

from torch import Tensor
from torch.nn.functional import interpolate

from toybox.measures.swd import build_laplacian_pyramid

__all__ = ["LEVELS", "measure_sharpness"]

LEVELS = 2


def measure_sharpness(images: Tensor, masks: Tensor) -> Tensor:
    """Images uint8 (N,H,W,3) and masks bool (N,H,W), True on the toy -> (N,), pixels in [0, 1]; 0
    without a toy."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    levels = build_laplacian_pyramid(pixels, pixels.shape[-1] >> LEVELS)[:LEVELS]
    energy = sum(
        interpolate(level.square().mean(1, keepdim=True), size=masks.shape[-2:]) for level in levels
    )[:, 0]
    inside = masks.float()
    return (energy * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
