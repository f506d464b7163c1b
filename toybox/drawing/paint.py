"""Brushes for grounds and backdrops: masks, ramps, cells, and shapes that several places share.

Coordinates, masks and shares are tensors (P,); colours are tensors (P, 3) of sRGB, or one RGB for
all points.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "RGB",
    "compute_band",
    "split_cells",
    "hash_to_unit",
    "shade_clouds",
    "shade_disc",
    "shade_firs",
    "shade_hill",
    "is_positive",
    "mix",
    "shade_mottle",
    "compute_ramp",
    "shade_sky",
]

RGB: TypeAlias = "tuple[float, float, float]"


def mix(a: Tensor | RGB, b: Tensor | RGB, share: Tensor) -> Tensor:
    """Mix the colours a and b, (P, 3) or one RGB: a where `share` (P,) is 0, b where it is 1."""
    a, b = (torch.as_tensor(c, dtype=share.dtype, device=share.device) for c in (a, b))
    return torch.lerp(a.expand(*share.shape, 3), b.expand(*share.shape, 3), share[:, None])


def is_positive(value: Tensor) -> Tensor:
    """1.0 where value > 0."""
    return (value > 0).to(value.dtype)


def compute_ramp(value: Tensor, low: float, high: float) -> Tensor:
    """Values (P,) -> (P,), smoothly from 0 at `low` to 1 at `high`."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def compute_band(value: Tensor, low: float, high: float) -> Tensor:
    return is_positive(torch.minimum(value - low, high - value))


def split_cells(value: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Return the number of the cell that each value (P,) lies in, and its distance from that cell's
    middle, (P,) each."""
    index = torch.floor(value / size)
    return index, value - (index + 0.5) * size


def hash_to_unit(i: Tensor, salt: float = 0.0) -> Tensor:
    """Return a fixed random number in [0, 1) for each integer (P,)."""
    return torch.frac((torch.sin(i * 12.9898 + salt * 4.1414) * 43758.547).abs())


def shade_mottle(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """Smooth blotches (P,) in [-1, 1], about one unit wide."""
    return torch.sin(2.1 * x + 1.3 * z + 6 * v) * torch.sin(1.7 * z - 1.1 * x + 9 * v)


def shade_hill(x: Tensor, v: Tensor, rough: float = 1.0) -> Tensor:
    """Return a skyline (P,) in about [-1, 1]."""
    return 0.6 * torch.sin(1.1 * rough * x + 6 * v) + 0.4 * torch.sin(2.3 * rough * x + 11 * v)


def shade_disc(x: Tensor, y: Tensor, cx: Tensor | float, cy: Tensor | float, r: float) -> Tensor:
    return is_positive(r * r - (x - cx) ** 2 - (y - cy) ** 2)


def shade_sky(y: Tensor, low: RGB, high: RGB) -> Tensor:
    return mix(low, high, compute_ramp(y, 0.0, 2.4))


def shade_clouds(colour: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Colours (P, 3) with white puffs, two to a frame."""
    index, dx = split_cells(x + 3 * v, 1.9)
    cy = 1.15 + 0.7 * hash_to_unit(index, 3)
    puff = torch.maximum(shade_disc(dx, y, 0.0, cy, 0.2), shade_disc(dx, y, 0.22, cy - 0.05, 0.15))
    return mix(
        colour,
        (1.0, 1.0, 1.0),
        torch.maximum(puff, shade_disc(dx, y, -0.22, cy - 0.04, 0.14)) * 0.85,
    )


def shade_firs(colour: Tensor, x: Tensor, y: Tensor, v: Tensor, leaf: RGB, snow: float) -> Tensor:
    """Colours (P, 3) with triangular trees along the foot of the backdrop."""
    index, dx = split_cells(x + 2 * v, 0.85)
    top = 0.85 + 0.5 * hash_to_unit(index, 1)
    tree = is_positive(torch.minimum((top - y) * 0.36 - dx.abs(), y - 0.12))
    colour = mix(colour, (0.35, 0.22, 0.12), is_positive(0.05 - dx.abs()) * is_positive(0.14 - y))
    white = is_positive(y - top * 0.62) * snow
    return mix(colour, mix(leaf, (0.97, 0.98, 1.0), white), tree)
