"""Kinds of toy that have a face: functions from points and genes to coloured parts."""

from __future__ import annotations

import torch
from torch import Tensor

from toybox.drawing.parts import (
    DARK,
    GOLD,
    MAIN,
    ORANGE,
    RED,
    SECOND,
    STEEL,
    WHITE,
    WOOD,
    Genes,
    Part,
    build_bow,
    build_hats,
    build_scarf,
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
    "build_bear",
    "build_cactus",
    "build_dinosaur",
    "build_duck",
    "build_fish",
    "build_mushroom",
    "build_rabbit",
    "build_robot",
    "build_snowman",
]


def build_robot(p: Point, g: Genes) -> list[Part]:
    m = mirror_x(p)
    w, h, head = scale_gene(g.girth, 0.27), scale_gene(g.height, 0.24), scale_gene(g.head, 0.19)
    leg = scale_gene(g.limb, 0.2, 0.3)
    chest, top = leg + h, leg + 2 * h
    crown = top + 0.04 + 1.5 * head
    return [
        (box(move_to(p, 0, chest, 0), w, h, 0.19, 0.04), MAIN),
        (box(move_to(p, 0, top + 0.04 + 0.75 * head, 0), head, 0.75 * head, 0.165, 0.04), MAIN),
        (box(move_to(m, 0.14, leg / 2, 0), 0.075, leg / 2 + 0.02, 0.09), SECOND),
        (box(move_to(m, 0.15, 0.05, -0.04), 0.1, 0.05, 0.15), SECOND),
        (capsule(m, (w + 0.06, top - 0.09, 0), (w + 0.12, top - 0.4, -0.04), 0.065), SECOND),
        (sphere(move_to(m, w + 0.13, top - 0.44, -0.05), 0.085), SECOND),
        (cylinder(move_to(p, 0, top + 0.02, 0), 0.08, 0.05), STEEL),
        (sphere(move_to(m, 0.09, top + 0.04 + 0.85 * head, -0.165), 0.052), GOLD),
        (box(move_to(p, 0, chest + 0.05, -0.19), 0.12, 0.075, 0.012, 0.005), DARK),
        (capsule(p, (0, crown, 0), (0, crown + 0.13, 0), 0.016), STEEL),
        (sphere(move_to(p, 0, crown + 0.15, 0), 0.045), RED),
        *build_scarf(p, g, 0, top + 0.02, 0, 0.15),
    ]


def build_duck(p: Point, g: Genes) -> list[Part]:
    m = mirror_z(p)
    long, r = scale_gene(g.girth, 0.42, 0.12), scale_gene(g.head, 0.225)
    tall = scale_gene(g.height, 0.3)
    y = 2 * tall + 0.55 * r
    x = -0.22
    body = ellipsoid(move_to(p, 0.04, tall, 0), long, tall, 0.31)
    tail = capsule(p, (0.28, tall + 0.05, 0), (0.52, tall + 0.26, 0), 0.12, 0.03)
    head = sphere(move_to(p, x, y, 0), r)
    return [
        (smooth_union(smooth_union(body, head, 0.12), tail, 0.1), MAIN),
        (
            ellipsoid(move_to(m, 0.1, tall + 0.02, 0.29), scale_gene(g.limb, 0.2), 0.13, 0.06),
            SECOND,
        ),
        (ellipsoid(move_to(p, x - r - 0.05, y - 0.03, 0), 0.13, 0.04, 0.1), ORANGE),
        (sphere(move_to(m, x - 0.75 * r, y + 0.3 * r, 0.58 * r), 0.042), DARK),
        *build_hats(p, g, x, y + r, 0, r),
        *build_scarf(p, g, x, y - r * 0.9, 0, r * 0.85),
        *build_bow(p, g, x, y + r + 0.03, 0),
    ]


def build_mushroom(p: Point, g: Genes) -> list[Part]:
    r, h = scale_gene(g.girth, 0.47, 0.15), scale_gene(g.height, 0.44)
    stem, dome = scale_gene(g.limb, 0.16), scale_gene(g.head, 0.42)
    cap = torch.maximum(ellipsoid(move_to(p, 0, h, 0), r, dome, r), h - 0.02 - p[1])
    m = mirror_x(p)
    return [
        (cap, MAIN),
        (cone(move_to(p, 0, h / 2, 0), stem * 1.3, stem, h / 2), SECOND),
        (torus(move_to(p, 0, h - 0.03, 0), r * 0.93, 0.035), WHITE),
        (sphere(move_to(m, 0.07, h * 0.6, -stem * 1.02), 0.035), DARK),
        *build_hats(p, g, 0, h + dome, 0, 0.24),
        *build_scarf(p, g, 0, h * 0.28, 0, stem * 1.25),
    ]


def build_snowman(p: Point, g: Genes) -> list[Part]:
    m = mirror_x(p)
    low, mid, head = (
        scale_gene(g.girth, 0.33, 0.15),
        scale_gene(g.height, 0.235),
        scale_gene(g.head, 0.185),
    )
    y2 = 1.75 * low + 0.7 * mid
    y3 = y2 + 0.75 * mid + 0.8 * head
    buttons = torch.minimum(
        sphere(move_to(p, 0, y2 + 0.08, -mid * 0.95), 0.035),
        sphere(move_to(p, 0, y2 - 0.05, -mid * 0.98), 0.035),
    )
    arm = capsule(m, (mid, y2, 0), (mid + scale_gene(g.limb, 0.24, 0.3), y2 + 0.17, -0.05), 0.024)
    cap = torch.maximum(sphere(move_to(p, 0, y3 + 0.03, 0), head * 1.07), y3 + 0.05 - p[1])
    return [
        (sphere(move_to(p, 0, low * 0.93, 0), low), MAIN),
        (sphere(move_to(p, 0, y2, 0), mid), MAIN),
        (sphere(move_to(p, 0, y3, 0), head), MAIN),
        (cap, SECOND),
        (sphere(move_to(p, 0, y3 + head * 1.2, 0), 0.065), SECOND),
        (_build_carrot(move_to(p, 0, y3 - 0.02, -head - 0.08), 0.045, 0.11), ORANGE),
        (torch.minimum(sphere(move_to(m, 0.07, y3 + 0.035, -head * 0.92), 0.03), buttons), DARK),
        (arm, WOOD),
        *build_scarf(p, g, 0, y3 - head * 0.8, 0, head * 0.9),
    ]


def _build_carrot(p: Point, radius: Num, half: Num) -> Tensor:
    """Build a cone that points to -z."""
    return cone(rotate_to_z(p), 0.008, radius, half)


def build_cactus(p: Point, g: Genes) -> list[Part]:
    r, top = scale_gene(g.girth, 0.15), scale_gene(g.height, 0.9, 0.12)
    arm, side = scale_gene(g.limb, 0.25), scale_gene(g.head, 0.09, 0.15)
    trunk = capsule(p, (0, 0.3, 0), (0, top, 0), r)
    left_arm = torch.minimum(
        capsule(p, (0, 0.5, 0), (-r - 0.15, 0.5, 0), side),
        capsule(p, (-r - 0.15, 0.5, 0), (-r - 0.15, 0.5 + arm, 0), side),
    )
    right_arm = torch.minimum(
        capsule(p, (0, 0.63, 0), (r + 0.14, 0.63, 0), side),
        capsule(p, (r + 0.14, 0.63, 0), (r + 0.14, 0.65 + arm * 0.8, 0), side),
    )
    eyes = sphere(move_to(mirror_x(p), 0.065, top - 0.08, -r * 0.92), 0.032)
    return [
        (smooth_union(trunk, torch.minimum(left_arm, right_arm), 0.04), MAIN),
        (cone(move_to(p, 0, 0.14, 0), 0.19, 0.27, 0.14), SECOND),
        (cylinder(move_to(p, 0, 0.28, 0), 0.3, 0.045), SECOND),
        (sphere(move_to(p, r + 0.14, 0.68 + arm * 0.8 + side * 0.8, 0), 0.065), RED),
        (eyes, DARK),
        *build_hats(p, g, 0, top + r, 0, r * 1.15),
        *build_scarf(p, g, 0, 0.42, 0, r * 0.95),
    ]


def build_bear(p: Point, g: Genes) -> list[Part]:
    m = mirror_x(p)
    w, tall, r = (
        scale_gene(g.girth, 0.29, 0.18),
        scale_gene(g.height, 0.31),
        scale_gene(g.head, 0.245),
    )
    neck = 0.08 + 2 * tall
    y = neck + 0.72 * r
    limb = scale_gene(g.limb, 0.1)
    body = ellipsoid(move_to(p, 0, 0.08 + tall, 0), w, tall, w * 0.85)
    legs = capsule(m, (w * 0.6, 0.11, -0.02), (w * 0.75, 0.11, -0.26), limb)
    arms = capsule(m, (w * 0.75, neck - 0.12, 0), (w + 0.13, neck - 0.3, -0.12), limb * 0.9)
    ears = sphere(move_to(m, r * 0.78, y + r * 0.72, 0), r * 0.4)
    limbs = torch.minimum(
        torch.minimum(legs, arms), torch.minimum(ears, sphere(move_to(p, 0, y, 0), r))
    )
    return [
        (torch.minimum(body, limbs), MAIN),
        (ellipsoid(move_to(p, 0, 0.06 + tall, -w * 0.35), w * 0.7, tall * 0.75, w * 0.6), SECOND),
        (ellipsoid(move_to(p, 0, y - 0.07, -r * 0.82), r * 0.45, r * 0.36, r * 0.36), SECOND),
        (sphere(move_to(m, r * 0.78, y + r * 0.72, -r * 0.27), r * 0.24), SECOND),
        (sphere(move_to(p, 0, y - 0.02, -r * 1.17), 0.045), DARK),
        (sphere(move_to(m, r * 0.38, y + r * 0.22, -r * 0.86), 0.04), DARK),
        *build_hats(p, g, 0, y + r, 0, r * 0.7),
        *build_scarf(p, g, 0, neck + 0.01, 0, r * 0.75),
        *build_bow(p, g, 0, neck + 0.0, -r * 0.85),
    ]


def build_rabbit(p: Point, g: Genes) -> list[Part]:
    m = mirror_x(p)
    w, tall, r = (
        scale_gene(g.girth, 0.24, 0.18),
        scale_gene(g.height, 0.26),
        scale_gene(g.head, 0.19),
    )
    y = 2 * tall + 0.75 * r
    ear = scale_gene(g.limb, 0.21, 0.25)
    tip = y + r * 0.75 + ear
    body = ellipsoid(move_to(p, 0, tall, 0.02), w, tall, w)
    head = ellipsoid(move_to(p, 0, y, -0.03), r, r * 0.95, r)
    ears = ellipsoid(move_to(m, r * 0.55, tip, 0), 0.075, ear, 0.055)
    arms = capsule(
        m, (w * 0.7, 2 * tall - 0.15, -0.08), (w * 0.6, 2 * tall - 0.26, -w - 0.04), 0.065
    )
    return [
        (smooth_union(torch.minimum(body, torch.minimum(arms, ears)), head, 0.04), MAIN),
        (ellipsoid(move_to(m, r * 0.55, tip, -0.035), 0.045, ear * 0.8, 0.04), SECOND),
        (ellipsoid(move_to(m, w * 0.62, 0.07, -w * 0.75), 0.1, 0.07, 0.19), SECOND),
        (ellipsoid(move_to(p, 0, tall * 0.95, -w * 0.4), w * 0.65, tall * 0.7, w * 0.66), SECOND),
        (sphere(move_to(p, 0, 0.17, w + 0.06), 0.1), WHITE),
        (sphere(move_to(p, 0, y - 0.03, -r - 0.03), 0.037), RED),
        (sphere(move_to(m, r * 0.45, y + r * 0.22, -r * 0.84 - 0.03), 0.036), DARK),
        *build_scarf(p, g, 0, 2 * tall - 0.0, 0, r * 0.78),
        *build_bow(p, g, 0, 2 * tall - 0.01, -r * 0.95),
    ]


def build_dinosaur(p: Point, g: Genes) -> list[Part]:
    m = mirror_z(p)
    belly, leg = scale_gene(g.girth, 0.22), scale_gene(g.limb, 0.26)
    y = leg + 0.12
    top = y + scale_gene(g.height, 0.48)
    r = scale_gene(g.head, 0.115)
    body = ellipsoid(move_to(p, 0.02, y, 0), 0.34, belly, belly * 0.9)
    neck = capsule(p, (-0.22, y + 0.02, 0), (-0.42, top, 0), 0.13, 0.08)
    tail = capsule(p, (0.22, y, 0), (0.72, y - 0.18, 0), 0.14, 0.03)
    head = ellipsoid(move_to(p, -0.48, top + 0.03, 0), r * 1.55, r, r)
    legs = capsule((p[0].abs(), p[1], m[2]), (0.2, y, 0.11), (0.2, 0.07, 0.13), 0.085)
    trunk = smooth_union(smooth_union(body, tail, 0.1), smooth_union(neck, head, 0.06), 0.1)
    spikes = _build_spikes(move_to(p, 0, y + belly * 0.85, 0))
    return [
        (smooth_union(trunk, legs, 0.05), MAIN),
        (spikes, SECOND),
        (cylinder(move_to((p[0].abs(), p[1], m[2]), 0.2, 0.035, 0.13), 0.105, 0.035), SECOND),
        (sphere(move_to(m, -0.51, top + 0.06, r * 0.85), 0.035), DARK),
        *build_hats(p, g, -0.46, top + 0.03 + r, 0, r * 1.2),
        *build_scarf(p, g, -0.33, y + 0.28, 0, 0.12),
    ]


def _build_spikes(p: Point) -> Tensor:
    """Three plates in a row along the back."""
    x = p[0] - 0.02 - 0.19 * ((p[0] - 0.02) / 0.19).round().clamp(-1, 1)
    drop = (p[0] - 0.02).abs() * 0.2
    return wedge((x, p[1] + 0.03 + drop, p[2]), 0.1, 0.2, 0.035)


def build_fish(p: Point, g: Genes) -> list[Part]:
    m = mirror_z(p)
    long, tall = scale_gene(g.girth, 0.42, 0.12), scale_gene(g.height, 0.32)
    y = tall + 0.08
    tail = move_to(p, long - 0.06, y, 0)
    fork = torch.maximum(
        torch.maximum(tail[1].abs() - 0.08 - tail[0] * scale_gene(g.limb, 0.8), -tail[0]),
        tail[0] - 0.3,
    )
    fin = wedge(move_to(p, 0.05, y + tall * 0.8, 0), scale_gene(g.head, 0.26), 0.3, 0.03)
    return [
        (ellipsoid(move_to(p, 0, y, 0), long, tall, 0.2), MAIN),
        (torch.maximum(fork * 0.78, tail[2].abs() - 0.03), SECOND),
        (fin, SECOND),
        (ellipsoid(move_to(m, 0.08, y - 0.07, 0.2), 0.13, 0.07, 0.035), SECOND),
        (ellipsoid(move_to(p, 0.0, 0.05, 0), 0.2, 0.06, 0.14), SECOND),
        (sphere(move_to(m, -long * 0.6, y + 0.08, 0.13), 0.065), WHITE),
        (sphere(move_to(m, -long * 0.6 - 0.02, y + 0.085, 0.172), 0.038), DARK),
        (torus(rotate_to_x(move_to(p, -long + 0.01, y - 0.04, 0)), 0.055, 0.028), RED),
        *build_hats(p, g, -0.16, y + tall * 0.92, 0, 0.17),
    ]
