"""Signed distance functions, from which toys are made.

A point cloud is a `Point`, three tensors x, y, z of one shape (P,), in toy units (a toy is about
one unit tall, stands on y = 0 and looks along -z or -x). A distance is a tensor (P,): negative
inside, zero on the surface. Primitives are centred on the origin; `at` moves them, `mirror_x` and
`mirror_z` double them, `rotate_to_x` and `rotate_to_z` lay an upright primitive down. Sizes are
numbers or tensors (P,), so that every point may belong to another toy.

The formulas follow https://iquilezles.org/articles/distfunctions.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Num",
    "Point",
    "move_to",
    "box",
    "capsule",
    "cone",
    "cylinder",
    "ellipsoid",
    "rotate_to_x",
    "rotate_to_z",
    "mirror_x",
    "mirror_z",
    "smooth_union",
    "sphere",
    "torus",
    "wedge",
]

Num: TypeAlias = "float | Tensor"
Point: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


def move_to(p: Point, x: Num, y: Num, z: Num) -> Point:
    """Return the points relative to (x, y, z)."""
    return p[0] - x, p[1] - y, p[2] - z


def mirror_x(p: Point) -> Point:
    return p[0].abs(), p[1], p[2]


def mirror_z(p: Point) -> Point:
    return p[0], p[1], p[2].abs()


def rotate_to_x(p: Point) -> Point:
    """Rotate the points so that an upright primitive of them lies along x."""
    return p[1], p[0], p[2]


def rotate_to_z(p: Point) -> Point:
    """Rotate the points so that an upright primitive of them lies along z."""
    return p[0], p[2], p[1]


def _compute_length(*parts: Tensor) -> Tensor:
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total = torch.addcmul(total, part, part)
    return total.sqrt_()


def sphere(p: Point, radius: Num) -> Tensor:
    return _compute_length(*p) - radius


def ellipsoid(p: Point, rx: Num, ry: Num, rz: Num) -> Tensor:
    """Return a bound of the distance, exact to first order at the surface."""
    q = p[0] / rx, p[1] / ry, p[2] / rz
    near = _compute_length(*q)
    slope = _compute_length(q[0] / rx, q[1] / ry, q[2] / rz)
    return near * (near - 1) / slope.clamp_min(1e-6)


def box(p: Point, hx: Num, hy: Num, hz: Num, rounding: float = 0.02) -> Tensor:
    """Half sizes hx, hy, hz; `rounding` is the radius of its edges and stays inside them."""
    x, y, z = (
        p[0].abs() - (hx - rounding),
        p[1].abs() - (hy - rounding),
        p[2].abs() - (hz - rounding),
    )
    inside = torch.maximum(torch.maximum(x, y), z).clamp_max(0)
    return _compute_length(x.clamp_min(0), y.clamp_min(0), z.clamp_min(0)) + inside - rounding


def cylinder(p: Point, radius: Num, half: Num, rounding: float = 0.015) -> Tensor:
    """Upright, of height 2 * half."""
    side = _compute_length(p[0], p[2]) - (radius - rounding)
    end = p[1].abs() - (half - rounding)
    return (
        _compute_length(side.clamp_min(0), end.clamp_min(0))
        + torch.maximum(side, end).clamp_max(0)
        - rounding
    )


def cone(p: Point, low: Num, high: Num, half: Num) -> Tensor:
    """Upright and truncated: radius `low` at y = -half, `high` at y = half. A lower bound
    outside."""
    slope = (high - low) / (2 * half)
    radius = low + slope * (p[1] + half)
    side = (_compute_length(p[0], p[2]) - radius) / (1 + slope * slope) ** 0.5
    return torch.maximum(side, p[1].abs() - half)


def torus(p: Point, radius: Num, thickness: Num) -> Tensor:
    """Return the distance of a ring that lies flat, round the y axis."""
    return _compute_length(_compute_length(p[0], p[2]) - radius, p[1]) - thickness


def capsule(
    p: Point,
    a: tuple[Num, Num, Num],
    b: tuple[Num, Num, Num],
    radius: Num,
    end_radius: Num | None = None,
) -> Tensor:
    """Return the distance of a sausage from a to b; with `end_radius` it tapers towards b (a close
    bound)."""
    q = move_to(p, *a)
    axis = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    length2 = axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2]
    along = ((q[0] * axis[0] + q[1] * axis[1] + q[2] * axis[2]) / length2).clamp(0, 1)
    gap = _compute_length(q[0] - along * axis[0], q[1] - along * axis[1], q[2] - along * axis[2])
    if end_radius is None:
        return gap - radius
    return (gap - (radius + along * (end_radius - radius))) * 0.95


def wedge(p: Point, width: Num, height: Num, depth: Num) -> Tensor:
    """Return the distance of a gable on y = 0: half `width` at its foot, a ridge along z at
    `height`, half length `depth`."""
    norm = (width * width + height * height) ** 0.5
    slope = (p[0].abs() * height + p[1] * width - width * height) / norm
    return torch.maximum(torch.maximum(slope, -p[1]), p[2].abs() - depth)


def smooth_union(a: Tensor, b: Tensor, blend: float) -> Tensor:
    """Return the union (P,) of distances a and b, with a fillet of about `blend` where the two
    surfaces meet."""
    h = (blend - (a - b).abs()).clamp_min(0) / blend
    return torch.minimum(a, b) - h * h * (blend * 0.25)
