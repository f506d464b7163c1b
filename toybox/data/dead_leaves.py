"""Dead-leaves pictures: overlapping shapes of all sizes, the simplest images with the statistics of
photographs.

Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001: radii follow r^-3. The VAE
sees some of them beside the renders, so that it also keeps ordinary photographs recognisable.
"""

import numpy as np

__all__ = ["generate_dead_leaves"]


def generate_dead_leaves(count: int, size_px: int, seed: int) -> np.ndarray:
    """uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    return np.stack([_draw_image(size_px, rng) for _ in range(count)])


def _draw_image(size: int, rng: np.random.Generator, shapes: int = 45) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    hue = rng.uniform(0.15, 0.85, 3)
    image = np.broadcast_to(hue, (size, size, 3)).astype(np.float32).copy()
    radii = np.sort(
        (rng.uniform(0, 1, shapes) * (5.0**-2 - (size / 2) ** -2) + (size / 2) ** -2) ** -0.5
    )[::-1]
    for radius in radii:
        cover = _draw_shape(x, y, radius, size, rng)[..., None]
        image += cover * (_shade_shape(x, y, radius, hue, rng) - image)
    image += rng.normal(0, rng.choice([0.0, 0.0, 0.01, 0.03]), image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _draw_shape(x, y, radius: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Coverage (H,W) in [0, 1] of a rotated ellipse or box, its edge one to a few pixels wide."""
    cx, cy, angle, aspect = *rng.uniform(0, size, 2), rng.uniform(0, np.pi), rng.uniform(0.35, 1)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / aspect
    distance = np.hypot(u, v) if rng.random() < 0.6 else np.maximum(np.abs(u), np.abs(v))
    return (0.5 + (radius - distance) / rng.choice([1.0, 1.0, 3.0])).clip(0, 1)


def _shade_shape(x, y, radius: float, hue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shade a colour near the picture's main colour, or any other, across the shape, sometimes with
    a wave."""
    colour = hue * 0.6 + 0.4 * rng.uniform(0, 1, 3) if rng.random() < 0.6 else rng.uniform(0, 1, 3)
    angle = rng.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / max(radius, 4)
    shade = 0.12 * np.sin(along)
    if rng.random() < 0.3:
        shade = shade + 0.15 * np.sin(along * rng.uniform(4, 12))
    return colour + shade[..., None]
