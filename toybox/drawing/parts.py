"""Parts that all kinds of toy share: genes, the paints of their parts, and things to wear.

A part is a pair (distance (P,), role); the role says which of the toy's paints covers it. Genes are
numbers around 0 that stretch the proportions (training draws them from [-1, 1]); every kind uses
them in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from toybox.drawing.sdf import (
    Num,
    Point,
    box,
    capsule,
    cone,
    cylinder,
    ellipsoid,
    mirror_x,
    move_to,
    sphere,
    torus,
)

__all__ = [
    "ACCENT",
    "ACCESSORIES",
    "GENES",
    "MAIN",
    "ROLE_COLOURS",
    "SECOND",
    "Genes",
    "Part",
    "build_bow",
    "build_flag",
    "scale_gene",
    "build_hats",
    "build_scarf",
]

GENES = ("height", "girth", "head", "limb")

MAIN, SECOND, ACCENT, DARK, WHITE, ORANGE, GLASS, WOOD, STEEL, GOLD, RED = range(11)
# Paints of the roles from DARK on; the first three are the toy's own.
ROLE_COLOURS = (
    (0.07, 0.07, 0.08),
    (0.97, 0.97, 0.95),
    (0.98, 0.55, 0.08),
    (0.62, 0.85, 0.95),
    (0.45, 0.28, 0.14),
    (0.58, 0.60, 0.63),
    (1.00, 0.86, 0.30),
    (0.86, 0.12, 0.12),
)
# name -> default colour
ACCESSORIES = {
    "top hat": "black",
    "party hat": "yellow",
    "scarf": "red",
    "bow": "pink",
    "flag": "red",
}

Part: TypeAlias = "tuple[Tensor, int]"


class Genes(NamedTuple):
    """Per point: the four genes (P,) and, for each accessory that some toy wears, who wears it (P,)
    bool."""

    height: Tensor
    girth: Tensor
    head: Tensor
    limb: Tensor
    worn: dict[str, Tensor]

    def select(self, index: Tensor) -> Genes:
        return Genes(
            *(gene[index] for gene in self[:4]),
            {name: mask[index] for name, mask in self.worn.items()},
        )


def scale_gene(gene: Tensor, size: float, share: float = 0.2) -> Tensor:
    return size * (1 + share * gene)


def _build_worn(g: Genes, name: str, parts: Callable[[], list[Part]]) -> list[Part]:
    """Build the parts of an accessory, where it is worn; nothing is computed when no toy wears
    it."""
    if name not in g.worn:
        return []
    return [(torch.where(g.worn[name], d, 9.0), role) for d, role in parts()]


def build_hats(p: Point, g: Genes, x: Num, y: Num, z: Num, size: Num) -> list[Part]:
    """Hats on a head whose top is (x, y, z) and whose radius is `size`."""
    q = move_to(p, x, y - 0.03, z)

    def top_hat() -> list[Part]:
        brim = cylinder(move_to(q, 0, 0.02, 0), size * 0.95, 0.022)
        return [
            (torch.minimum(brim, cylinder(move_to(q, 0, 0.12, 0), size * 0.6, 0.12)), ACCENT),
            (cylinder(move_to(q, 0, 0.065, 0), size * 0.62, 0.03), RED),
        ]

    def party_hat() -> list[Part]:
        return [
            (cone(move_to(q, 0, 0.14, 0), size * 0.65, 0.01, 0.15), ACCENT),
            (sphere(move_to(q, 0, 0.3, 0), 0.045), WHITE),
        ]

    return _build_worn(g, "top hat", top_hat) + _build_worn(g, "party hat", party_hat)


def build_scarf(p: Point, g: Genes, x: Num, y: Num, z: Num, size: Num) -> list[Part]:
    """Build a scarf round a neck of radius `size` at (x, y, z), its end hanging down in front and
    to the side."""
    q = move_to(p, x, y, z)

    def scarf_parts() -> list[Part]:
        ring = torus(q, size, 0.055)
        end = capsule(q, (-size * 0.75, 0, -size * 0.75), (-size * 0.9, -0.22, -size * 0.9), 0.05)
        return [(torch.minimum(ring, end), ACCENT)]

    return _build_worn(g, "scarf", scarf_parts)


def build_bow(p: Point, g: Genes, x: Num, y: Num, z: Num) -> list[Part]:
    def bow_parts() -> list[Part]:
        q = move_to(p, x, y, z)
        loops = ellipsoid(move_to(mirror_x(q), 0.085, 0, 0), 0.085, 0.06, 0.04)
        return [(torch.minimum(loops, sphere(q, 0.045)), ACCENT)]

    return _build_worn(g, "bow", bow_parts)


def build_flag(p: Point, g: Genes, x: Num, y: Num, z: Num) -> list[Part]:
    """Build a flag on a pole that stands on (x, y, z)."""

    def flag_parts() -> list[Part]:
        q = move_to(p, x, y, z)
        pole = capsule(q, (0.0, 0.0, 0.0), (0.0, 0.32, 0.0), 0.014)
        return [(pole, STEEL), (box(move_to(q, 0.12, 0.25, 0), 0.11, 0.075, 0.016, 0.01), ACCENT)]

    return _build_worn(g, "flag", flag_parts)
