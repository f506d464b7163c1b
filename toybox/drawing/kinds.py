"""The kinds of toy by name, and functions of their shape: distance, nearest part, size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from toybox.drawing import creatures, things
from toybox.drawing.parts import Genes, Part
from toybox.drawing.sdf import Point

__all__ = ["SHAPES", "Shape", "compiled_distance", "distance", "measure", "roles"]


class Shape(NamedTuple):
    """How a kind is built and what it may wear."""

    parts: Callable[[Point, Genes], list[Part]]
    accessories: tuple[str, ...] = ()


_DRESSED = ("top hat", "party hat", "scarf")
SHAPES: dict[str, Shape] = {
    "robot": Shape(creatures.robot, ("scarf",)),
    "duck": Shape(creatures.duck, (*_DRESSED, "bow")),
    "house": Shape(things.house, ("flag",)),
    "mushroom": Shape(creatures.mushroom, _DRESSED),
    "snowman": Shape(creatures.snowman, ("scarf",)),
    "rocket": Shape(things.rocket, ("flag",)),
    "car": Shape(things.car, ("flag",)),
    "train": Shape(things.train, ("flag",)),
    "teapot": Shape(things.teapot),
    "cactus": Shape(creatures.cactus, _DRESSED),
    "bear": Shape(creatures.bear, (*_DRESSED, "bow")),
    "rabbit": Shape(creatures.rabbit, ("scarf", "bow")),
    "boat": Shape(things.boat, ("flag",)),
    "lamp": Shape(things.lamp),
    "dinosaur": Shape(creatures.dinosaur, _DRESSED),
    "fish": Shape(creatures.fish, ("top hat", "party hat")),
    "castle": Shape(things.castle, ("flag",)),
    "mug": Shape(things.mug),
}


def distance(kind: str, p: Tensor, g: Genes) -> Tensor:
    """Distance (P,) from points p (3, P) to the whole toy."""
    return reduce(torch.minimum, (d for d, _ in SHAPES[kind].parts((p[0], p[1], p[2]), g)))


def roles(kind: str, p: Tensor, g: Genes) -> Tensor:
    """Role (P,) of the part nearest to each of the points p (3, P)."""
    parts = SHAPES[kind].parts((p[0], p[1], p[2]), g)
    nearest = torch.stack([d for d, _ in parts]).argmin(0)
    return torch.tensor([role for _, role in parts], device=p.device)[nearest]


@cache
def compiled_distance(kind: str) -> Callable[[Tensor, Genes], Tensor]:
    """`distance` (3, P) -> (P,) of one kind as compiled code: ten times faster, after some seconds
    of compilation."""
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 2 * len(SHAPES)
    )
    compiled = torch.compile(partial(distance, kind), dynamic=True)
    return lambda p, g: compiled(p, g) if p.shape[1] > 1 else distance(kind, p, g)


def measure(kind: str, g: Genes, steps: int = 28) -> Tensor:
    """Half width, height and half depth (3, M) of M toys, from a coarse grid; g holds M genes of
    each name."""
    axis = torch.linspace(-0.98, 0.98, steps, device=g.height.device)
    cell = float(axis[1] - axis[0])
    x, y, z = (c.reshape(-1) for c in torch.meshgrid(axis, (axis + 1) * 0.85, axis, indexing="ij"))
    sizes = []
    for toy in torch.arange(len(g.height), device=axis.device):
        inside = distance(kind, torch.stack([x, y, z]), g.take(toy.expand(1))) < cell * 0.5
        sizes.append(torch.stack([c[inside].amax() for c in (x.abs(), y, z.abs())]))
    return torch.stack(sizes, 1)
