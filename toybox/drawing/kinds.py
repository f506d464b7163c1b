"""Kinds of toy by name, and functions of their shape: distance, nearest part, size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from toybox.drawing import creatures, things
from toybox.drawing.parts import Genes, Part
from toybox.drawing.sdf import Point

__all__ = ["SHAPES", "Shape", "compile_distance", "compute_distance", "measure", "find_roles"]


class Shape(NamedTuple):
    """Builder of a kind, and the accessories that it may wear."""

    parts: Callable[[Point, Genes], list[Part]]
    accessories: tuple[str, ...] = ()


_WEARABLE = ("top hat", "party hat", "scarf")
SHAPES: dict[str, Shape] = {
    "robot": Shape(creatures.build_robot, ("scarf",)),
    "duck": Shape(creatures.build_duck, (*_WEARABLE, "bow")),
    "house": Shape(things.build_house, ("flag",)),
    "mushroom": Shape(creatures.build_mushroom, _WEARABLE),
    "snowman": Shape(creatures.build_snowman, ("scarf",)),
    "rocket": Shape(things.build_rocket, ("flag",)),
    "car": Shape(things.build_car, ("flag",)),
    "train": Shape(things.train, ("flag",)),
    "teapot": Shape(things.build_teapot),
    "cactus": Shape(creatures.build_cactus, _WEARABLE),
    "bear": Shape(creatures.build_bear, (*_WEARABLE, "bow")),
    "rabbit": Shape(creatures.build_rabbit, ("scarf", "bow")),
    "boat": Shape(things.build_boat, ("flag",)),
    "lamp": Shape(things.build_lamp),
    "dinosaur": Shape(creatures.build_dinosaur, _WEARABLE),
    "fish": Shape(creatures.build_fish, ("top hat", "party hat")),
    "castle": Shape(things.build_castle, ("flag",)),
    "mug": Shape(things.build_mug),
}


def compute_distance(kind: str, p: Tensor, g: Genes) -> Tensor:
    """Distance (P,) from points p (3, P) to the whole toy."""
    return reduce(torch.minimum, (d for d, _ in SHAPES[kind].parts((p[0], p[1], p[2]), g)))


def find_roles(kind: str, p: Tensor, g: Genes) -> Tensor:
    """Role (P,) of the part nearest to each of the points p (3, P)."""
    parts = SHAPES[kind].parts((p[0], p[1], p[2]), g)
    nearest = torch.stack([d for d, _ in parts]).argmin(0)
    return torch.tensor([role for _, role in parts], device=p.device)[nearest]


@cache
def compile_distance(kind: str) -> Callable[[Tensor, Genes], Tensor]:
    """`distance` (3, P) -> (P,) of one kind as compiled code: ten times faster, after some seconds
    of compilation."""
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 2 * len(SHAPES)
    )
    compiled = torch.compile(partial(compute_distance, kind), dynamic=True)
    return lambda p, g: compiled(p, g) if p.shape[1] > 1 else compute_distance(kind, p, g)


def measure(kind: str, g: Genes, steps: int = 28) -> Tensor:
    """Half width, height and half depth (3, M) of M toys, from a coarse grid; g holds M genes of
    each name."""
    axis = torch.linspace(-0.98, 0.98, steps, device=g.height.device)
    cell = float(axis[1] - axis[0])
    x, y, z = (c.reshape(-1) for c in torch.meshgrid(axis, (axis + 1) * 0.85, axis, indexing="ij"))
    sizes = []
    for toy in torch.arange(len(g.height), device=axis.device):
        inside = (
            compute_distance(kind, torch.stack([x, y, z]), g.select(toy.expand(1))) < cell * 0.5
        )
        sizes.append(torch.stack([c[inside].amax() for c in (x.abs(), y, z.abs())]))
    return torch.stack(sizes, 1)
