"""Kinds of toy that are buildings, vehicles and household things: functions from points and genes
to parts."""

from __future__ import annotations

import torch
from torch import Tensor

from toybox.drawing.parts import (
    DARK,
    GLASS,
    GOLD,
    MAIN,
    RED,
    SECOND,
    STEEL,
    WOOD,
    Genes,
    Part,
    build_flag,
    scale_gene,
)
from toybox.drawing.sdf import (
    Num,
    Point,
    box,
    capsule,
    cone,
    cylinder,
    ellipsoid,
    mirror_x,
    mirror_z,
    move_to,
    rotate_to_x,
    rotate_to_z,
    smooth_union,
    sphere,
    torus,
    wedge,
)

__all__ = [
    "build_boat",
    "build_car",
    "build_castle",
    "build_house",
    "build_lamp",
    "build_mug",
    "build_rocket",
    "build_teapot",
    "train",
]


def build_house(p: Point, g: Genes) -> list[Part]:
    w, h, d = (
        scale_gene(g.girth, 0.4, 0.15),
        scale_gene(g.height, 0.28),
        scale_gene(g.limb, 0.36, 0.12),
    )
    roof = scale_gene(g.head, 0.36)
    xz = mirror_x(mirror_z(p))
    front = torch.minimum(
        box(move_to(xz, 0.22, h * 1.2, d), 0.085, 0.1, 0.015, 0.005),
        box(move_to(xz, w, h * 1.1, 0.0), 0.015, 0.11, 0.13, 0.005),
    )
    return [
        (box(move_to(p, 0, h, 0), w, h, d, 0.01), MAIN),
        (wedge(move_to(p, 0, 2 * h - 0.02, 0), w + 0.12, roof, d + 0.08), SECOND),
        (box(move_to(p, 0, 0.17, -d), 0.095, 0.17, 0.02, 0.01), WOOD),
        (front, GOLD),
        (box(move_to(p, 0.2, 2 * h + 0.27, 0.12), 0.065, 0.17, 0.065, 0.01), RED),
        *build_flag(p, g, 0, 2 * h + roof - 0.06, 0),
    ]


def build_rocket(p: Point, g: Genes) -> list[Part]:
    r, half = scale_gene(g.girth, 0.2), scale_gene(g.height, 0.36, 0.15)
    nose = scale_gene(g.head, 0.16)
    y = half + 0.14
    fin = scale_gene(g.limb, 0.17)
    xz = mirror_x(mirror_z(p))
    fins = torch.minimum(
        _build_fin(move_to(xz, r * 0.9, 0.0, 0.0), fin),
        _build_fin(move_to((xz[2], xz[1], xz[0]), r * 0.9, 0.0, 0.0), fin),
    )
    window = move_to(mirror_z(p), 0, y + half * 0.4, r * 0.93)
    return [
        (
            smooth_union(
                cylinder(move_to(p, 0, y, 0), r, half),
                ellipsoid(move_to(p, 0, y, 0), r * 1.18, half, r * 1.18),
                0.05,
            ),
            MAIN,
        ),
        (cone(move_to(p, 0, y + half + nose - 0.01, 0), r, 0.015, nose), SECOND),
        (fins, SECOND),
        (cone(move_to(p, 0, 0.1, 0), r * 0.85, r * 0.6, 0.07), STEEL),
        (cylinder(rotate_to_z(window), 0.095, 0.05), STEEL),
        (cylinder(rotate_to_z(window), 0.07, 0.065), GLASS),
        *build_flag(p, g, 0, y + half + 2 * nose - 0.06, 0),
    ]


def _build_fin(p: Point, size: Num) -> Tensor:
    """Build a swept fin in the x-y plane that grows out of the y axis."""
    slope = (p[0] * 0.9 + p[1] * 0.6 - 0.24 - size * 0.35) / 1.08
    return torch.maximum(torch.maximum(slope, p[0] - size), torch.maximum(-p[1], p[2].abs() - 0.03))


def build_car(p: Point, g: Genes) -> list[Part]:
    long, tall = scale_gene(g.girth, 0.58, 0.1), scale_gene(g.height, 0.15)
    cabin, wheel = scale_gene(g.head, 0.3, 0.15), scale_gene(g.limb, 0.145, 0.15)
    y = wheel + tall
    m = mirror_z(p)
    axle = move_to((p[0].abs(), p[1], m[2]), long * 0.6, wheel, 0.27)
    glass = torch.minimum(
        box(move_to(p, 0.05, y + tall + 0.12, 0), cabin * 0.8, 0.075, 0.245, 0.02),
        box(move_to(p, 0.05, y + tall + 0.12, 0), cabin + 0.012, 0.075, 0.19, 0.02),
    )
    return [
        (box(move_to(p, 0, y, 0), long, tall, 0.28, 0.08), MAIN),
        (box(move_to(p, 0.05, y + tall + 0.1, 0), cabin, 0.16, 0.235, 0.07), SECOND),
        (glass, GLASS),
        (cylinder(rotate_to_z(axle), wheel, 0.06), DARK),
        (cylinder(rotate_to_z(axle), wheel * 0.5, 0.075), STEEL),
        (sphere(move_to(m, -long + 0.01, y + 0.02, 0.17), 0.055), GOLD),
        (sphere(move_to(m, long - 0.01, y + 0.02, 0.17), 0.045), RED),
        *build_flag(p, g, 0.25, y + tall + 0.24, 0),
    ]


def train(p: Point, g: Genes) -> list[Part]:
    r, half = scale_gene(g.girth, 0.19, 0.15), 0.34
    cab, chimney = scale_gene(g.height, 0.3, 0.15), scale_gene(g.head, 0.13, 0.3)
    wheel = scale_gene(g.limb, 0.115, 0.15)
    m = mirror_z(p)
    y = wheel * 2 + r * 0.9
    wheels = move_to(m, 0, wheel, 0.24)
    third = (
        wheels[0] + 0.02 - 0.32 * ((wheels[0] + 0.02) / 0.32).round().clamp(-1, 1),
        wheels[1],
        wheels[2],
    )
    return [
        (cylinder(rotate_to_x(move_to(p, -0.16, y, 0)), r, half + 0.06), MAIN),
        (box(move_to(p, 0.36, wheel + cab, 0), 0.17, cab, 0.26, 0.02), MAIN),
        (box(move_to(p, 0.36, wheel + 2 * cab + 0.02, 0), 0.23, 0.04, 0.31, 0.02), SECOND),
        (box(move_to(p, 0.36, wheel + cab * 1.45, 0), 0.1, 0.1, 0.27, 0.01), GLASS),
        (box(move_to(p, 0.0, wheel + 0.09, 0), 0.54, 0.05, 0.22), SECOND),
        (cylinder(rotate_to_z(third), wheel, 0.04), DARK),
        (cylinder(rotate_to_z(third), wheel * 0.55, 0.052), RED),
        (cone(move_to(p, -0.42, y + r + chimney - 0.02, 0), 0.055, 0.1, chimney), SECOND),
        (sphere(move_to(p, -0.08, y + r, 0), 0.1), GOLD),
        (cylinder(rotate_to_x(move_to(p, -0.56, y, 0)), 0.085, 0.03), GOLD),
        (wedge((p[2], p[1] - 0.02, p[0] + 0.56), 0.24, 0.2, 0.06), STEEL),
        *build_flag(p, g, 0.36, wheel + 2 * cab + 0.05, 0),
    ]


def build_teapot(p: Point, g: Genes) -> list[Part]:
    r, tall = scale_gene(g.girth, 0.38, 0.12), scale_gene(g.height, 0.33)
    y = tall + 0.03
    body = ellipsoid(move_to(p, 0, y, 0), r, tall, r)
    spout = capsule(
        p, (-r * 0.8, y - 0.1, 0), (-r - scale_gene(g.limb, 0.24, 0.25), y + 0.22, 0), 0.1, 0.045
    )
    handle = move_to(p, r + 0.06, y + 0.02, 0)
    return [
        (smooth_union(body, spout, 0.06), MAIN),
        (torus(rotate_to_z(handle), scale_gene(g.head, 0.19), 0.045), SECOND),
        (cylinder(move_to(p, 0, y + tall * 0.9, 0), r * 0.52, 0.05, 0.03), SECOND),
        (sphere(move_to(p, 0, y + tall * 0.9 + 0.11, 0), 0.075), SECOND),
        (cylinder(move_to(p, 0, 0.03, 0), r * 0.6, 0.03), SECOND),
        *build_flag(p, g, 0, y + tall + 0.1, 0),
    ]


def build_boat(p: Point, g: Genes) -> list[Part]:
    long, deck = scale_gene(g.girth, 0.56, 0.12), 0.27
    mast, sail = scale_gene(g.height, 0.78, 0.15), scale_gene(g.limb, 0.4)
    hull = torch.maximum(
        ellipsoid(move_to(p, 0, deck, 0), long, scale_gene(g.head, 0.27, 0.15), 0.24), p[1] - deck
    )
    foot = deck + 0.12
    main_sail = _build_sail(move_to(p, 0.03, foot, 0), sail, mast - 0.1)
    jib = _build_sail((-p[0] - 0.03, p[1] - foot, p[2]), sail * 0.75, (mast - 0.1) * 0.7)
    return [
        (hull, MAIN),
        (main_sail, MAIN),
        (jib, SECOND),
        (
            torch.maximum(
                ellipsoid(move_to(p, 0, deck, 0), long * 1.03, 0.27, 0.255),
                (p[1] - deck).abs() - 0.03,
            ),
            SECOND,
        ),
        (cylinder(move_to(p, 0, deck + mast / 2, 0), 0.022, mast / 2), WOOD),
        (box(move_to(p, 0.02, deck + 0.04, 0), 0.2, 0.05, 0.1), WOOD),
        *build_flag(p, g, 0, deck + mast - 0.06, 0),
    ]


def _build_sail(p: Point, width: Num, height: Num) -> Tensor:
    """Build a right-angled triangle in the x-y plane, its right angle at the origin."""
    norm = (width * width + height * height) ** 0.5
    slope = (p[0] * height + p[1] * width - width * height) / norm
    return torch.maximum(torch.maximum(slope, -p[0]), torch.maximum(-p[1], p[2].abs() - 0.022))


def build_lamp(p: Point, g: Genes) -> list[Part]:
    stem, wide = scale_gene(g.height, 0.62, 0.15), scale_gene(g.girth, 0.36, 0.15)
    tall = scale_gene(g.head, 0.2)
    y = stem + 0.12
    shade = torch.maximum(
        cone(move_to(p, 0, y, 0), wide, wide * 0.55, tall),
        -cone(move_to(p, 0, y - 0.03, 0), wide - 0.02, wide * 0.5, tall),
    )
    return [
        (shade, MAIN),
        (torus(move_to(p, 0, y - tall, 0), wide * 0.98, 0.024), SECOND),
        (cylinder(move_to(p, 0, stem / 2, 0), scale_gene(g.limb, 0.04, 0.3), stem / 2), SECOND),
        (sphere(move_to(p, 0, 0.33, 0), scale_gene(g.limb, 0.1, 0.2)), MAIN),
        (cone(move_to(p, 0, 0.05, 0), 0.25, 0.19, 0.05), MAIN),
        (sphere(move_to(p, 0, y - 0.06, 0), 0.1), GOLD),
    ]


def build_castle(p: Point, g: Genes) -> list[Part]:
    xz = mirror_x(mirror_z(p))
    w, wall = scale_gene(g.girth, 0.36, 0.12), scale_gene(g.height, 0.22)
    tower, roof = wall + 0.16, scale_gene(g.head, 0.15)
    r = scale_gene(g.limb, 0.125)
    keep = wall * 2 + 0.22
    teeth_x = xz[0] - 0.14 * (xz[0] / 0.14).round().clamp(0, 1)
    teeth = box((teeth_x, xz[1] - 2 * wall - 0.03, xz[2] - w), 0.04, 0.05, 0.05, 0.005)
    side = box(
        (xz[0] - w, xz[1] - 2 * wall - 0.03, xz[2] - 0.14 * (xz[2] / 0.14).round().clamp(0, 1)),
        0.05,
        0.05,
        0.04,
        0.005,
    )
    walls = torch.minimum(box(move_to(p, 0, wall, 0), w, wall, w, 0.01), torch.minimum(teeth, side))
    return [
        (torch.minimum(walls, cylinder(move_to(xz, w, tower, w), r, tower)), MAIN),
        (cone(move_to(xz, w, 2 * tower + roof, w), r * 1.25, 0.01, roof), SECOND),
        (box(move_to(p, 0, keep / 2, 0), 0.17, keep / 2 + 0.1, 0.17, 0.01), MAIN),
        (cone(move_to(p, 0, keep + 0.1 + roof * 1.1, 0), 0.25, 0.01, roof * 1.1), SECOND),
        (box(move_to(p, 0, 0.14, -w), 0.1, 0.15, 0.02, 0.01), WOOD),
        (box(move_to(xz, w, 2 * tower - 0.12, w + r), 0.035, 0.06, 0.012, 0.005), DARK),
        *build_flag(p, g, 0, keep + 0.08 + roof * 2.1, 0),
    ]


def build_mug(p: Point, g: Genes) -> list[Part]:
    r, half = scale_gene(g.girth, 0.34, 0.15), scale_gene(g.height, 0.38, 0.18)
    outer = cylinder(move_to(p, 0, half, 0), r, half, 0.03)
    cup = torch.maximum(outer, -cylinder(move_to(p, 0, half + 0.1, 0), r - 0.045, half))
    handle = torus(
        rotate_to_z(move_to(p, r + 0.04, half, 0)),
        scale_gene(g.limb, 0.2),
        scale_gene(g.head, 0.05),
    )
    return [
        (cup, MAIN),
        (torch.maximum(handle, r - 0.03 - p[0]), SECOND),
        (torus(move_to(p, 0, 2 * half - 0.02, 0), r - 0.02, 0.028), SECOND),
        (cylinder(move_to(p, 0, half * 1.75, 0), r - 0.04, 0.02), WOOD),
    ]
