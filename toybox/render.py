"""Scenes in, pictures out: `render(scenes)` is a tensor uint8 (N, H, W, 3).

The camera stands at z < 0 and looks along +z; toys turn by the yaw, so a place always shows the
same side. Every picture is shaded at the pixels' centres. Pixels whose colour differs from a
neighbour's get three more points, which makes clean edges at a small cost. Works on any torch
device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toybox.drawing.paint import mix
from toybox.drawing.places import BACKDROP_DISTANCE, LIGHT_TABLE, PLACES, SCENERY
from toybox.drawing.trace import ToyGroup, cross, dot, normalize
from toybox.world import Scene

__all__ = ["render", "render_masks"]

HALF_VIEW = 0.32  # tangent of half the field of view
CONTRAST = 18 / 255  # between neighbours: above it a pixel is shaded again
MIDDLE = (0.0, 0.0)
# with the middle, four points spread over the pixel
SUBPIXELS = ((-0.36, -0.12), (0.08, 0.38), (0.28, -0.26))
LENS_SIGMA = 0.6 / 128  # standard deviation of the point spread, in picture widths
GROUP_SIZE = 24  # scenes shaded at once


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    size_px: int = 128,
    device: torch.device | str = "cpu",
    compiled: bool = False,
) -> Tensor:
    """Pictures (N, size_px, size_px, 3) uint8 of the scenes, in their order, on `device`.

    `compiled` is faster for thousands of pictures, but first spends some seconds on each kind.
    """
    device = torch.device(device)
    pictures = torch.empty(len(scenes), size_px, size_px, 3, dtype=torch.uint8, device=device)
    at_once = max(1, GROUP_SIZE * 128 * 128 // (size_px * size_px))
    for numbers in _split_by_kinds(scenes).values():
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            stage = Stage.from_scenes([scenes[i] for i in some], device, compiled)
            pictures[torch.tensor(some, device=device)] = _render_images(stage, size_px)
    return pictures


@torch.no_grad()
def render_masks(scenes: Sequence[Scene], size_px: int = 64) -> Tensor:
    """Return which pixels of `render(scenes, size_px)` show a toy: bool (N, size_px, size_px)."""
    masks = torch.zeros(len(scenes), size_px * size_px, dtype=torch.bool)
    for numbers in _split_by_kinds(scenes).values():
        stage = Stage.from_scenes([scenes[i] for i in numbers], torch.device("cpu"), compiled=False)
        pixels = torch.arange(len(numbers) * size_px * size_px)
        eye, d, scene = _compute_rays(stage, pixels, size_px, MIDDLE)
        hit = torch.zeros(len(pixels), dtype=torch.bool)
        for herd in stage.herds:
            hit[herd.find_hits(eye, d, scene)[0]] = True
        masks[torch.tensor(numbers)] = hit.view(len(numbers), -1)
    return masks.view(len(scenes), size_px, size_px)


def _split_by_kinds(scenes: Sequence[Scene]) -> dict[tuple[str, ...], list[int]]:
    """Numbers of the scenes, by the kinds of toys in them."""
    groups = defaultdict(list)
    for number, scene in enumerate(scenes):
        groups[tuple(toy.kind for toy in scene.toys)].append(number)
    return groups


@dataclass
class Stage:
    """N scenes whose toys are of the same kinds, ready to be shaded."""

    herds: list[ToyGroup]
    place: Tensor  # (N,)
    variant: Tensor  # (N,)
    light: Tensor  # (11, N): ambient, sun and veil colours, veil amount, haze
    light_names: list[str]
    sun: Tensor  # (3, N) direction towards it
    eye: Tensor  # (3, N)
    axes: tuple[Tensor, Tensor, Tensor]  # forward, right, up (3, N)
    offset: Tensor  # (2, N)

    @classmethod
    def from_scenes(cls, scenes: list[Scene], device: torch.device, compiled: bool) -> Stage:
        def column(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        yaw = column(*(s.yaw for s in scenes))
        herds = [
            ToyGroup.from_toys(toys, yaw, device, compiled)
            for toys in zip(*(s.toys for s in scenes))
        ]
        size = _align_groups(herds)
        distance = column(*(s.distance for s in scenes)) * size
        pitch = column(*(s.pitch for s in scenes))
        height = torch.stack([h.size[1] for h in herds]).amax(0)
        zero = torch.zeros_like(pitch)
        forward = torch.stack([zero, -pitch.sin(), pitch.cos()])
        right = torch.stack([zero + 1, zero, zero])
        azimuth, elevation = (column(*(s.sun[k] for s in scenes)) for k in (0, 1))
        flat = elevation.cos()
        return cls(
            herds,
            torch.tensor([PLACES.index(s.place) for s in scenes], device=device),
            column(*(s.variant for s in scenes)),
            torch.stack(
                [
                    column(*a.ambient, *a.sun, *a.veil, a.veil_amount, a.haze)
                    for a in _list_lights(scenes)
                ],
                1,
            ),
            [s.light for s in scenes],
            torch.stack([azimuth.sin() * flat, elevation.sin(), -azimuth.cos() * flat]),
            torch.stack([zero, height / 2, zero]) - distance * forward,
            (forward, right, cross(forward, right)),
            column(*(value for s in scenes for value in s.offset)).view(-1, 2).T,
        )


def _list_lights(scenes: list[Scene]) -> list:
    return [LIGHT_TABLE[scene.light] for scene in scenes]


def _align_groups(herds: list[ToyGroup]) -> Tensor:
    """Place the herds side by side; returns the size (N,) that the camera must frame."""
    widths = [herd.compute_half_width() for herd in herds]
    total = sum(widths) * 2 + 0.1 * (len(herds) - 1)
    left_edge = -total / 2
    for herd, width in zip(herds, widths):
        herd.x = left_edge + width
        left_edge = left_edge + 2 * width + 0.1
    height = torch.stack([herd.size[1] for herd in herds]).amax(0)
    return torch.maximum(height, 0.75 * total)


def _render_images(stage: Stage, size_px: int) -> Tensor:
    """Pictures (N, size_px, size_px, 3) uint8."""
    count, device = len(stage.place), stage.place.device
    numbers = torch.arange(count * size_px * size_px, device=device)
    flat, is_toy = _shade_pixels(
        stage, numbers, size_px, MIDDLE, torch.ones_like(numbers, dtype=torch.bool)
    )
    image = flat.view(count, size_px, size_px, 3)
    edges = _is_edge(image).view(-1).nonzero()[:, 0]
    near_toy = (
        F.max_pool2d(is_toy.view(count, 1, size_px, size_px).float(), 3, 1, 1).view(-1)[edges] > 0
    )
    fine = [_shade_pixels(stage, edges, size_px, shift, near_toy)[0] for shift in SUBPIXELS]
    flat[edges] = (flat[edges] + sum(fine)) / (len(fine) + 1)
    for number, name in enumerate(stage.light_names):
        if name in ("rain", "snowfall"):
            image[number] = _draw_weather(image[number], name, float(stage.variant[number]))
    return (_blur_lens(image.clamp(0, 1)) * 255).round().to(torch.uint8)


def _blur_lens(image: Tensor) -> Tensor:
    """Blur pictures (N, H, W, 3) as a lens does, by a Gaussian."""
    sigma = LENS_SIGMA * image.shape[1]
    reach = torch.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1, device=image.device)
    taps = torch.softmax(-(reach**2) / (2 * sigma**2), 0)
    flat = image.permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    for kernel in (taps[None, None, :, None], taps[None, None, None, :]):
        edge = (kernel.shape[3] // 2,) * 2 + (kernel.shape[2] // 2,) * 2
        flat = F.conv2d(F.pad(flat, edge, mode="replicate"), kernel)
    return flat.view(len(image), 3, *image.shape[1:3]).permute(0, 2, 3, 1)


def _is_edge(image: Tensor) -> Tensor:
    """Pixels (N, H, W) that differ from the one to the right or below, together with those
    neighbours."""
    edge = torch.zeros(image.shape[:3], dtype=torch.bool, device=image.device)
    across = (image[:, :, 1:] - image[:, :, :-1]).abs().amax(-1) > CONTRAST
    down = (image[:, 1:] - image[:, :-1]).abs().amax(-1) > CONTRAST
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    return edge


def _shade_pixels(
    stage: Stage, numbers: Tensor, size_px: int, shift: tuple[float, float], near_toy: Tensor
) -> tuple[Tensor, Tensor]:
    """Colours (R, 3) of the pixels with these numbers, and whether a toy is there (R,).

    The rays pass `shift` pixels off the centres; toys are traced only where `near_toy` (R,).
    """
    return _shade(stage, *_compute_rays(stage, numbers, size_px, shift), near_toy.nonzero()[:, 0])


def _compute_rays(
    stage: Stage, numbers: Tensor, size_px: int, shift: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """For the pixels with these numbers: the eye (3, R), the ray's direction (3, R), the scene's
    number (R,)."""
    scene = numbers // (size_px * size_px)
    row, column = numbers // size_px % size_px, numbers % size_px
    x = (column + 0.5 + shift[0]) * (2 / size_px) - 1 - stage.offset[0][scene]
    y = 1 - (row + 0.5 + shift[1]) * (2 / size_px) - stage.offset[1][scene]
    forward, right, up = stage.axes
    d = normalize(forward[:, scene] + HALF_VIEW * (x * right[:, scene] + y * up[:, scene]))
    return stage.eye[:, scene], d, scene


def _shade(
    stage: Stage, o: Tensor, d: Tensor, scene: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Colours (R, 3) along rays from o in direction d (3, R), and whether they hit a toy; only
    `candidates` are traced."""
    colour = torch.zeros(len(scene), 3, device=o.device)
    nearest = torch.full_like(o[0], torch.inf)
    for herd in stage.herds:
        ray, t = herd.find_hits(o[:, candidates], d[:, candidates], scene[candidates])
        ray = candidates[ray]
        is_nearer = t < nearest[ray]
        ray, t = ray[is_nearer], t[is_nearer]
        nearest[ray] = t
        colour[ray] = _shade_toy(stage, herd, o[:, ray] + t * d[:, ray], d[:, ray], scene[ray])
    is_toy = nearest.isfinite()
    background = (~is_toy).nonzero()[:, 0]
    colour[background] = _shade_place(stage, o[:, background], d[:, background], scene[background])
    return colour, is_toy


def _shade_toy(stage: Stage, herd: ToyGroup, p: Tensor, d: Tensor, scene: Tensor) -> Tensor:
    base, normal, open_sky, material = herd.compute_surface(p, scene)
    light, sun = stage.light[:, scene], stage.sun[:, scene]
    facing = dot(normal, sun)
    sky_share = (0.5 + 0.5 * normal[1]) * open_sky
    ambient = light[0:3] * (0.55 + 0.55 * sky_share)
    diffuse = light[3:6] * (facing.clamp_min(0) * (0.4 + 0.6 * open_sky))
    glint = dot(normal, normalize(sun - d)).clamp_min(0) ** 36
    mirror = d - 2 * dot(normal, d) * normal
    sheen = (
        mix((0.18, 0.17, 0.16), (1.0, 1.0, 1.0), (mirror[1] * 2.2 + 0.45).clamp(0, 1))
        * (light[0:3] + 0.3).T
    )
    rim = (1 + dot(normal, d)).clamp(0, 1) ** 3
    matte = base * (ambient + diffuse).T + 0.10 * (rim * light[0])[:, None]
    glossy = (
        matte
        + (0.75 * glint)[:, None] * (light[3:6] + 0.35).T
        + (0.05 + 0.3 * rim)[:, None] * sheen
    )
    metal = base * (0.45 * (ambient + diffuse).T + 0.85 * sheen) + (0.55 * glint)[:, None]
    kind = material[:, None]
    colour = torch.where(kind == 0, matte, torch.where(kind == 1, glossy, metal))
    return mix(colour, light[6:9].T, light[10])


def _shade_place(stage: Stage, o: Tensor, d: Tensor, scene: Tensor) -> Tensor:
    to_ground = torch.where(d[1] < -1e-4, -o[1] / d[1], torch.inf)
    to_backdrop = (BACKDROP_DISTANCE - o[2]) / d[2].clamp_min(0.05)
    is_ground = to_ground < to_backdrop
    p = o + torch.minimum(to_ground, to_backdrop) * d
    colour = torch.empty(len(scene), 3, device=o.device)
    place, v = stage.place[scene], stage.variant[scene]
    code = place * 2 + is_ground
    for number in torch.unique(code).tolist():
        ray = (code == number).nonzero()[:, 0]
        scenery, x = SCENERY[PLACES[number // 2]], p[0, ray]
        if number % 2:
            colour[ray] = scenery.ground(x, p[2, ray], v[ray])
        else:
            colour[ray] = scenery.backdrop(x, p[1, ray], v[ray])
    light = stage.light[:, scene]
    ray = is_ground.nonzero()[:, 0]
    colour[ray] *= _compute_ground_light(stage, p[:, ray], scene[ray]).T
    depth = ((p[2] - 0.4) / (BACKDROP_DISTANCE - 0.4)).clamp(0, 1)
    veil = torch.where(is_ground, light[9] * depth**1.3 * 0.9, light[9]) + light[10] * 0.6 * (
        1 - depth
    )
    return mix(colour, light[6:9].T, veil.clamp(0, 1))


def _compute_ground_light(stage: Stage, p: Tensor, scene: Tensor) -> Tensor:
    """Light (3, R) on ground points."""
    light, sun = stage.light[:, scene], stage.sun[:, scene]
    direct, ambient = sun[1].clone(), torch.ones_like(sun[1])
    for herd in stage.herds:
        direct *= herd.compute_shadow(p, sun, scene)
        ambient *= herd.compute_contact(p, scene)
    return light[0:3] * ambient + light[3:6] * direct


def _draw_weather(image: Tensor, name: str, variant: float) -> Tensor:
    """Soft flakes or streaks over a picture (H, W, 3) in [0, 1]."""
    size = image.shape[0]
    axis = (torch.arange(size, device=image.device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    falling = name == "rain"
    x = x + (0.12 * y if falling else 0) + variant
    wide, tall = (0.17, 0.36) if falling else (0.21, 0.21)
    i, j = torch.floor(x / wide), torch.floor(y / tall + variant * 5)
    dx, dy = x / wide - i - 0.5, y / tall + variant * 5 - j - 0.5
    dx = dx - 0.6 * (torch.frac((torch.sin(i * 12.99 + j * 78.23) * 43758.5).abs()) - 0.5)
    dy = dy - 0.5 * (torch.frac((torch.sin(i * 39.35 + j * 11.14) * 24634.6).abs()) - 0.5)
    r = (dx / 0.07) ** 2 + (dy / 0.22) ** 2 if falling else (dx / 0.13) ** 2 + (dy / 0.13) ** 2
    share = (1.4 - r).clamp(0, 1) * (0.4 if falling else 0.7)
    return torch.lerp(image, torch.ones_like(image), share[..., None])
