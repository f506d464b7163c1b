"""Sixteen places of a toy: each has a ground and a backdrop painted by a formula.

A ground maps (x, z) to a colour; z grows away from the camera up to the backdrop, an upright canvas
at z = BACKDROP. The backdrop maps (x, y) on that canvas, y up from the ground. All are tensors (P,)
in toy units; `v` (P,) in [0, 1) shifts the scenery. Colours are tensors (P, 3) of sRGB. Shapes are
large and the shading smooth, so that a small autoencoder can keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dreambooth_moslora.photos.toy_readers import PLACE_LIGHTS
from toybox.drawing.paint import (
    RGB,
    compute_band,
    compute_ramp,
    hash_to_unit,
    is_positive,
    mix,
    shade_clouds,
    shade_disc,
    shade_firs,
    shade_hill,
    shade_mottle,
    shade_sky,
    split_cells,
)

__all__ = ["BACKDROP_DISTANCE", "LIGHTS", "PLACES", "SCENERY", "Light", "list_lights"]

BACKDROP_DISTANCE = 4.0

Paint: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"


class Light(NamedTuple):
    """Colours of the light on toy and ground, and a veil that covers the backdrop (and the rest by
    `haze`)."""

    ambient: RGB
    sun: RGB
    veil: RGB
    veil_amount: float
    haze: float


LIGHT_TABLE: dict[str, Light] = {
    "day": Light((0.52, 0.53, 0.56), (0.62, 0.60, 0.55), (1.0, 1.0, 1.0), 0.0, 0.0),
    "sunset": Light((0.52, 0.42, 0.45), (0.75, 0.50, 0.25), (0.98, 0.48, 0.22), 0.50, 0.02),
    "night": Light((0.34, 0.36, 0.50), (0.34, 0.38, 0.50), (0.02, 0.03, 0.12), 0.74, 0.0),
    "overcast": Light((0.66, 0.67, 0.70), (0.18, 0.18, 0.18), (0.66, 0.68, 0.71), 0.50, 0.03),
    "fog": Light((0.68, 0.69, 0.71), (0.16, 0.16, 0.16), (0.83, 0.85, 0.87), 0.80, 0.16),
    "rain": Light((0.56, 0.59, 0.65), (0.18, 0.18, 0.20), (0.42, 0.47, 0.55), 0.58, 0.05),
    "snowfall": Light((0.68, 0.70, 0.74), (0.20, 0.20, 0.20), (0.78, 0.82, 0.88), 0.50, 0.05),
}
LIGHTS = tuple(LIGHT_TABLE)


def shade_grass(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return mix((0.22, 0.56, 0.14), (0.36, 0.70, 0.20), 0.5 + 0.5 * shade_mottle(x, z, v))


def shade_meadow(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_clouds(shade_sky(y, (0.70, 0.87, 1.0), (0.32, 0.62, 0.96)), x, y, v)
    colour = mix(colour, (0.42, 0.72, 0.32), is_positive(0.42 + 0.18 * shade_hill(x, v) - y))
    return mix(
        colour, (0.26, 0.58, 0.20), is_positive(0.16 + 0.08 * shade_hill(x, v + 0.4, 1.4) - y)
    )


def shade_snow(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return mix((0.86, 0.90, 0.97), (0.97, 0.98, 1.0), 0.5 + 0.5 * shade_mottle(x, z, v))


def shade_snowy_firs(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_sky(y, (0.86, 0.92, 0.99), (0.62, 0.77, 0.93))
    colour = mix(colour, (0.94, 0.96, 1.0), is_positive(0.34 + 0.14 * shade_hill(x, v) - y))
    return shade_firs(colour, x, y, v, (0.16, 0.38, 0.30), 1.0)


def shade_sand(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.90, 0.80, 0.54), (0.97, 0.89, 0.66), 0.5 + 0.5 * shade_mottle(x, z, v))
    shore = z - 2.2 - 0.15 * torch.sin(2 * x + 6 * v)
    return mix(
        mix(colour, (0.98, 0.99, 1.0), is_positive(shore)),
        (0.10, 0.58, 0.74),
        is_positive(shore - 0.25),
    )


def shade_sea_and_palm(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_clouds(shade_sky(y, (0.78, 0.92, 1.0), (0.24, 0.64, 0.98)), x, y, v)
    colour = mix(colour, (0.05, 0.42, 0.70), is_positive(0.3 - y))
    px = x - torch.where(v < 0.5, 1.15, -1.15) - 0.12 * (y - 0.2)
    colour = mix(colour, (0.50, 0.34, 0.18), is_positive(0.06 - px.abs()) * is_positive(1.25 - y))
    leaf = is_positive(
        0.075 - (y - 1.32 + 0.9 * px * px - 0.16 * (9 * px).sin().abs()).abs()
    ) * is_positive(0.58 - px.abs())
    return mix(colour, (0.10, 0.50, 0.18), leaf)


def shade_planks(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    index, dx = split_cells(x + v, 0.5)
    tone = mix((0.58, 0.37, 0.19), (0.70, 0.47, 0.26), hash_to_unit(index))
    return mix(tone, (0.44, 0.27, 0.13), is_positive(dx.abs() - 0.225))


def shade_room_with_window(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.93, 0.88, 0.74), (0.96, 0.93, 0.82), compute_ramp(y, 0.0, 2.0))
    colour = mix(colour, (0.99, 0.98, 0.95), is_positive(0.13 - y))
    wx = x - torch.where(v < 0.5, 1.05, -1.05)
    frame = torch.minimum(0.48 - wx.abs(), 0.45 - (y - 1.05).abs())
    pane = torch.minimum(frame - 0.05, torch.maximum(wx.abs() - 0.025, -frame))
    colour = mix(colour, (0.50, 0.32, 0.18), is_positive(frame))
    return mix(colour, (0.60, 0.84, 0.99), is_positive(pane))


def shade_rug(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    r = (x * x + z * z).sqrt()
    colour = mix((0.80, 0.74, 0.66), (0.84, 0.79, 0.71), 0.5 + 0.5 * shade_mottle(x, z, v))
    colour = mix(colour, (0.45, 0.13, 0.58), is_positive(1.55 - r))
    return mix(colour, (0.80, 0.58, 0.90), compute_band(r, 1.28, 1.40))


def shade_grey_blue_wall(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.62, 0.72, 0.80), (0.72, 0.80, 0.86), compute_ramp(y, 0.0, 2.0))
    colour = mix(colour, (0.95, 0.95, 0.94), is_positive(0.13 - y))
    px = x - torch.where(v < 0.5, 0.95, -0.95)
    picture = torch.minimum(0.36 - px.abs(), 0.30 - (y - 1.0).abs())
    colour = mix(colour, (0.86, 0.70, 0.30), is_positive(picture))
    return mix(
        colour,
        mix((0.98, 0.96, 0.88), (0.90, 0.40, 0.35), shade_disc(px, y, 0.0, 1.0, 0.15)),
        is_positive(picture - 0.05),
    )


def shade_dunes(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return mix(
        (0.83, 0.50, 0.20),
        (0.95, 0.66, 0.34),
        0.5 + 0.5 * torch.sin(2.6 * z + 1.2 * torch.sin(x + 5 * v)),
    )


def shade_pyramids(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_sky(y, (1.0, 0.90, 0.66), (0.96, 0.74, 0.42))
    colour = mix(
        colour, (1.0, 0.97, 0.80), shade_disc(x, y, torch.where(v < 0.5, -0.75, 0.75), 1.45, 0.16)
    )
    for cx, top in ((-1.25, 0.95), (1.15, 0.75)):
        dx = x - cx - (v - 0.5) * 0.5
        colour = mix(colour, (0.80, 0.56, 0.28), is_positive(top - y - dx.abs()))
        colour = mix(
            colour, (0.62, 0.40, 0.20), is_positive(top - y - dx.abs()) * is_positive(dx - 0.08)
        )
    return mix(colour, (0.90, 0.60, 0.28), is_positive(0.16 + 0.08 * shade_hill(x, v) - y))


def shade_checkers(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    odd = (torch.floor((x + v) / 0.9) + torch.floor(z / 0.9)) % 2
    return mix((0.24, 0.25, 0.28), (0.90, 0.90, 0.89), odd)


def shade_plain_wall(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.66, 0.68, 0.70), (0.80, 0.81, 0.82), compute_ramp(y, 0.0, 2.2))
    return mix(colour, (0.20, 0.20, 0.22), is_positive(0.11 - y))


def shade_pink_floor(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return mix((0.90, 0.52, 0.66), (0.95, 0.62, 0.74), 0.5 + 0.5 * shade_mottle(x, z, v))


def shade_pink_wall(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    _, dx = split_cells(x + v, 0.6)
    colour = mix((1.0, 0.74, 0.84), (1.0, 0.84, 0.90), is_positive(dx.abs() - 0.15))
    return mix(colour, (1.0, 0.97, 0.98), is_positive(0.14 - y))


def shade_water(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    wave = torch.sin(5 * z + 1.5 * torch.sin(1.6 * x + 7 * v) + 9 * v)
    colour = mix((0.05, 0.32, 0.62), (0.14, 0.48, 0.78), 0.5 + 0.5 * wave)
    return mix(colour, (0.62, 0.84, 0.96), compute_ramp(wave, 0.86, 1.0) * 0.7)


def shade_islands(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_clouds(shade_sky(y, (0.80, 0.90, 0.98), (0.42, 0.70, 0.95)), x, y, v)
    colour = mix(colour, (0.36, 0.54, 0.56), is_positive(0.30 + 0.26 * shade_hill(x, v, 0.9) - y))
    return mix(colour, (0.05, 0.34, 0.62), is_positive(0.2 - y))


def shade_forest_floor(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return mix((0.20, 0.27, 0.10), (0.36, 0.32, 0.16), 0.5 + 0.5 * shade_mottle(x, z, v))


def shade_trunks(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.20, 0.38, 0.18), (0.10, 0.27, 0.12), compute_ramp(y, 0.1, 1.6))
    for size, salt, tone in ((0.5, 5.0, (0.22, 0.16, 0.09)), (0.78, 8.0, (0.40, 0.26, 0.14))):
        index, dx = split_cells(x + 2 * v, size)
        shift = (hash_to_unit(index, salt) - 0.5) * 0.3
        colour = mix(colour, tone, is_positive(size * 0.17 - (dx - shift).abs()))
    crown = 1.28 + 0.10 * torch.sin(5 * x + 9 * v) + 0.05 * torch.sin(11 * x)
    colour = mix(colour, (0.08, 0.36, 0.12), is_positive(y - crown))
    return mix(colour, (0.18, 0.42, 0.14), is_positive(0.14 + 0.07 * torch.sin(7 * x + 3 * v) - y))


def shade_asphalt(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.30, 0.31, 0.33), (0.36, 0.37, 0.39), 0.5 + 0.5 * shade_mottle(x, z, v))
    _, dx = split_cells(x + 2 * v, 1.1)
    dash = is_positive(0.32 - dx.abs())
    colour = mix(colour, (0.88, 0.87, 0.84), compute_band(z, 0.9, 1.25) * dash)
    return mix(colour, (0.62, 0.61, 0.60), is_positive(z - 2.6))


def shade_buildings(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_sky(y, (0.80, 0.88, 0.95), (0.52, 0.72, 0.93))
    index, dx = split_cells(x + 3 * v, 0.95)
    top = 1.05 + 0.9 * hash_to_unit(index, 2)
    tones = mix((0.66, 0.32, 0.24), (0.56, 0.56, 0.60), is_positive(hash_to_unit(index, 4) - 0.35))
    tones = mix(tones, (0.84, 0.72, 0.52), is_positive(hash_to_unit(index, 4) - 0.7))
    colour = mix(colour, tones, is_positive(torch.minimum(top - y, 0.445 - dx.abs())))
    _, wx = split_cells(dx + 0.445, 0.445)
    floor, wy = split_cells(y - 0.1, 0.5)
    window = torch.minimum(
        torch.minimum(0.125 - wx.abs(), 0.15 - wy.abs()),
        torch.minimum(top - y - 0.1, 0.43 - dx.abs()),
    )
    lit = is_positive(hash_to_unit(index * 7 + floor, 6) - 0.4)
    return mix(
        colour,
        mix((0.28, 0.36, 0.46), (0.98, 0.88, 0.54), lit),
        is_positive(window) * is_positive(y - 0.14),
    )


def shade_craters(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.56, 0.56, 0.58), (0.66, 0.66, 0.67), 0.5 + 0.5 * shade_mottle(x, z, v))
    i, dx = split_cells(x + 2 * v, 1.8)
    j, dz = split_cells(z, 1.8)
    size = 0.36 + 0.26 * hash_to_unit(i * 5 + j, 1)
    r = ((dx - 0.4 * (hash_to_unit(i + 9 * j, 2) - 0.5)) ** 2 + dz * dz).sqrt()
    return mix(colour, (0.44, 0.44, 0.46), compute_ramp(size - r, -0.05, 0.05))


def shade_space(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.02, 0.02, 0.05), (0.04, 0.04, 0.10), compute_ramp(y, 0.0, 2.0))
    i, dx = split_cells(x + 2 * v, 0.6)
    j, dy = split_cells(y, 0.6)
    sx, sy = (
        (hash_to_unit(i * 3 + 7 * j, 1) - 0.5) * 0.36,
        (hash_to_unit(i * 5 + 3 * j, 2) - 0.5) * 0.36,
    )
    colour = mix(colour, (0.85, 0.85, 0.80), shade_disc(dx, dy, sx, sy, 0.035))
    ex = torch.where(v < 0.5, 1.0, -1.0)
    colour = mix(colour, (0.16, 0.42, 0.88), shade_disc(x, y, ex, 1.2, 0.32))
    land = torch.maximum(
        shade_disc(x, y, ex - 0.1, 1.26, 0.13), shade_disc(x, y, ex + 0.14, 1.06, 0.1)
    )
    colour = mix(colour, (0.24, 0.62, 0.28), land)
    return mix(colour, (0.50, 0.50, 0.52), is_positive(0.2 + 0.12 * shade_hill(x, v, 1.3) - y))


def shade_kitchen_tiles(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    _, dx = split_cells(x + v, 0.95)
    _, dz = split_cells(z, 0.95)
    joint = is_positive(torch.maximum(dx.abs(), dz.abs()) - 0.435)
    return mix((0.80, 0.48, 0.35), (0.88, 0.68, 0.56), joint)


def shade_cupboards(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    _, dx = split_cells(x + v, 0.7)
    colour = mix((0.90, 0.92, 0.92), (0.95, 0.96, 0.95), compute_ramp(y, 0.9, 1.6))
    door = torch.minimum(0.31 - dx.abs(), 0.34 - (y - 0.44).abs())
    low = mix((0.12, 0.42, 0.44), (0.22, 0.58, 0.58), is_positive(door))
    low = mix(
        low,
        (0.92, 0.90, 0.80),
        is_positive(torch.minimum(0.12 - dx.abs(), 0.04 - (y - 0.64).abs())),
    )
    colour = mix(colour, low, is_positive(0.84 - y))
    colour = mix(colour, (0.46, 0.30, 0.16), compute_band(y, 0.84, 0.94))
    upper = mix(
        (0.12, 0.42, 0.44),
        (0.22, 0.58, 0.58),
        is_positive(torch.minimum(0.32 - dx.abs(), y - 1.58)),
    )
    return mix(colour, upper, is_positive(y - 1.53))


def shade_stage_floor(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    _, dx = split_cells(x + v, 0.6)
    colour = mix((0.33, 0.19, 0.10), (0.25, 0.14, 0.07), is_positive(dx.abs() - 0.27))
    return mix(
        colour, (0.98, 0.88, 0.62), compute_ramp(-(x * x + z * z).sqrt(), -1.5, -1.15) * 0.62
    )


def shade_curtains(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    fold = 0.5 + 0.5 * torch.sin(9 * x + 6 * v + 0.5 * torch.sin(2 * y))
    colour = mix((0.48, 0.02, 0.05), (0.82, 0.08, 0.10), fold)
    scallop = 1.62 + 0.12 * torch.cos(4.5 * x).abs()
    colour = mix(colour, (0.66, 0.04, 0.08), is_positive(y - scallop))
    colour = mix(colour, (0.95, 0.76, 0.22), compute_band(y - scallop, -0.02, 0.06))
    return mix(colour, (0.95, 0.76, 0.22), is_positive(0.08 - y))


def shade_leaves(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.66, 0.36, 0.10), (0.74, 0.46, 0.16), 0.5 + 0.5 * shade_mottle(x, z, v))
    for salt, tone in ((1.0, (0.86, 0.32, 0.10)), (2.0, (0.92, 0.70, 0.20))):
        i, dx = split_cells(x + v + 0.35 * salt, 0.9)
        j, dz = split_cells(z + 0.45 * salt, 0.9)
        sx, sz = (
            (hash_to_unit(i * 3 + 7 * j, salt) - 0.5) * 0.36,
            (hash_to_unit(i * 5 + 3 * j, salt) - 0.5) * 0.36,
        )
        along, across = (
            (dx - sx) + (dz - sz) * (2 * salt - 3),
            (dz - sz) - (dx - sx) * (2 * salt - 3),
        )
        colour = mix(
            colour, tone, compute_ramp(0.10 - along**2 * 0.6 - across**2 * 1.6, -0.02, 0.02)
        )
    return colour


def shade_autumn_trees(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = shade_sky(y, (0.96, 0.92, 0.82), (0.70, 0.82, 0.92))
    index, dx = split_cells(x + 2 * v, 0.9)
    top = 0.85 + 0.25 * hash_to_unit(index, 1)
    colour = mix(colour, (0.36, 0.22, 0.12), is_positive(0.055 - dx.abs()) * is_positive(top - y))
    tone = mix((0.93, 0.48, 0.08), (0.82, 0.22, 0.08), is_positive(hash_to_unit(index, 2) - 0.55))
    tone = mix(tone, (0.96, 0.74, 0.16), is_positive(hash_to_unit(index, 3) - 0.6))
    crown = torch.maximum(
        shade_disc(dx, y, 0.0, top, 0.36), shade_disc(dx, y, 0.16, top - 0.16, 0.26)
    )
    colour = mix(colour, tone, torch.maximum(crown, shade_disc(dx, y, -0.18, top - 0.14, 0.25)))
    return mix(colour, (0.64, 0.34, 0.10), is_positive(0.16 + 0.06 * shade_hill(x, v, 2.0) - y))


def shade_lava(x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    u = x + 0.25 * torch.sin(1.3 * z + 8 * v)
    w = z + 0.25 * torch.sin(1.1 * x + 5 * v)
    crack = torch.minimum((torch.sin(1.9 * u + 2 * v)).abs(), (torch.sin(1.7 * w + 0.5 * u)).abs())
    colour = mix((0.20, 0.11, 0.10), (0.96, 0.34, 0.05), compute_ramp(-crack, -0.42, -0.12))
    return mix(colour, (0.99, 0.72, 0.20), compute_ramp(-crack, -0.14, 0.0))


def shade_volcano(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    colour = mix((0.80, 0.22, 0.06), (0.20, 0.04, 0.06), compute_ramp(y, 0.0, 1.8))
    dx = x - torch.where(v < 0.5, 0.95, -0.95)
    cone = torch.minimum(1.15 - y, 1.45 - y - dx.abs() * 1.35)
    colour = mix(
        colour,
        (1.0, 0.62, 0.12),
        is_positive(torch.minimum(0.13 + (y - 1.15) * 0.4 - dx.abs(), 1.75 - y))
        * is_positive(y - 1.1),
    )
    colour = mix(colour, (0.15, 0.09, 0.10), is_positive(cone))
    flow = is_positive(
        0.07 + 0.03 * torch.sin(9 * y) - (dx - 0.08 * torch.sin(5 * y)).abs()
    ) * is_positive(cone)
    colour = mix(colour, (1.0, 0.46, 0.06), flow)
    return mix(colour, (0.14, 0.08, 0.09), is_positive(0.16 + 0.1 * shade_hill(x, v, 1.6) - y))


class Place(NamedTuple):
    """Ground and backdrop."""

    ground: Paint
    backdrop: Paint


SCENERY: dict[str, Place] = {
    "on grass": Place(shade_grass, shade_meadow),
    "in the snow": Place(shade_snow, shade_snowy_firs),
    "on the beach": Place(shade_sand, shade_sea_and_palm),
    "on a wooden floor": Place(shade_planks, shade_room_with_window),
    "on a purple rug": Place(shade_rug, shade_grey_blue_wall),
    "in the desert": Place(shade_dunes, shade_pyramids),
    "on a checkered floor": Place(shade_checkers, shade_plain_wall),
    "in a pink room": Place(shade_pink_floor, shade_pink_wall),
    "on water": Place(shade_water, shade_islands),
    "in a forest": Place(shade_forest_floor, shade_trunks),
    "on a city street": Place(shade_asphalt, shade_buildings),
    "on the moon": Place(shade_craters, shade_space),
    "in a kitchen": Place(shade_kitchen_tiles, shade_cupboards),
    "on a stage with red curtains": Place(shade_stage_floor, shade_curtains),
    "on autumn leaves": Place(shade_leaves, shade_autumn_trees),
    "on lava": Place(shade_lava, shade_volcano),
}
PLACES: tuple[str, ...] = tuple(SCENERY)


def list_lights(place: str) -> tuple[str, ...]:
    """List the lights under which the place may be shown."""
    return PLACE_LIGHTS[place]
