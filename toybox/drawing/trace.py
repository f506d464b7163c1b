"""Ray tracing of toys: sphere tracing, normals, soft shadows and the paint of a toy.

Vectors are tensors (3, R), one ray per column. A `ToyGroup` has one toy per scene, all of one kind;
`scene` (R,) is the number of a ray's scene, hence of its toy. Rays that miss a toy's bounding box
cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from toybox.drawing.kinds import SHAPES, compile_distance, compute_distance, find_roles, measure
from toybox.drawing.parts import ACCENT, MAIN, ROLE_COLOURS, SECOND, Genes
from toybox.world import COLOURS, MATERIALS, PATTERNS, Toy

__all__ = ["ToyGroup", "cross", "dot", "normalize"]

HIT_DISTANCE = 0.003  # toy units: a quarter of a pixel at 128 px
_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def normalize(a: Tensor) -> Tensor:
    return a / dot(a, a).sqrt().clamp_min(1e-9)


def cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a, b, dim=0)


@dataclass
class ToyGroup:
    """Toys of N scenes, one in each: their genes and looks, and their positions."""

    kind: str
    distance: Callable[[Tensor, Genes], Tensor]  # of points (3, R)
    genes: Genes  # of (N,)
    size: Tensor  # (3, N) half width, height, half depth
    paints: Tensor  # (N, roles, 3)
    pattern: Tensor  # (N,)
    material: Tensor  # (N,)
    cos: Tensor  # (N,) of the yaw
    sin: Tensor
    x: Tensor  # (N,) where it stands on the ground, at z = 0

    @classmethod
    def from_toys(
        cls, toys: Sequence[Toy], yaw: Tensor, device: torch.device, compiled: bool
    ) -> ToyGroup:
        """Group toys that share a kind, turned by yaw (N,) and standing at x = 0."""
        kind = toys[0].kind
        # Compiled code needs the same arguments every time; otherwise accessories that no toy wears
        # are skipped.
        names = (
            SHAPES[kind].accessories
            if compiled
            else {name for toy in toys for name in toy.accessories}
        )
        worn = {
            name: torch.tensor([name in t.accessories for t in toys], device=device)
            for name in sorted(names)
        }
        genes = Genes(*torch.tensor([t.genes for t in toys], device=device).unbind(1), worn)
        paints = [
            (COLOURS[t.colour], COLOURS[t.colour2], COLOURS[t.accent_colour], *ROLE_COLOURS)
            for t in toys
        ]
        return cls(
            kind,
            compile_distance(kind) if compiled else partial(compute_distance, kind),
            genes,
            measure(kind, genes),
            torch.tensor(paints, device=device),
            torch.tensor([PATTERNS.index(t.pattern) for t in toys], device=device),
            torch.tensor([MATERIALS.index(t.material) for t in toys], device=device),
            yaw.cos(),
            yaw.sin(),
            torch.zeros_like(yaw),
        )

    def compute_half_width(self) -> Tensor:
        """Half of the width (N,) that the turned toy takes up on the screen."""
        return self.cos.abs() * self.size[0] + self.sin.abs() * self.size[2]

    def to_local(self, v: Tensor, scene: Tensor, is_point: bool) -> Tensor:
        """Vectors (3, R) of the world in the toy's own axes."""
        c, s = self.cos[scene], self.sin[scene]
        x = v[0] - self.x[scene] if is_point else v[0]
        return torch.stack([c * x - s * v[2], v[1], s * x + c * v[2]])

    def to_world(self, v: Tensor, scene: Tensor) -> Tensor:
        """Directions (3, R) in the toy's axes, converted to those of the world."""
        c, s = self.cos[scene], self.sin[scene]
        return torch.stack([c * v[0] + s * v[2], v[1], c * v[2] - s * v[0]])

    def compute_span(
        self, o: Tensor, d: Tensor, scene: Tensor, margin: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the distances (R,), (R,) at which local rays enter and leave the bounding box; a
        larger entry means a miss."""
        half = self.size[:, scene] + margin
        low = torch.stack([-half[0], torch.full_like(half[1], -0.01), -half[2]])
        inverse = 1 / torch.where(d.abs() < 1e-6, 1e-6, d)
        a, b = (low - o) * inverse, (half - o) * inverse
        return torch.minimum(a, b).amax(0).clamp_min(0), torch.maximum(a, b).amin(0)

    def find_hits(
        self, o: Tensor, d: Tensor, scene: Tensor, steps: int = 56
    ) -> tuple[Tensor, Tensor]:
        """Find the rays that hit the toy: their numbers (H,) and distances (H,)."""
        near, far = self._compute_local_span(o, d, scene, 0.05)
        ray = (near < far).nonzero()[:, 0]
        t, far = near[ray], far[ray]
        o, d = (
            self.to_local(o[:, ray], scene[ray], True),
            self.to_local(d[:, ray], scene[ray], False),
        )
        genes = self.genes.select(scene[ray])
        rays, ts = [], []
        for step in range(steps):
            gap = self.distance(torch.addcmul(o, d, t), genes)
            t = t + gap
            if step % 3 == 2 or step == steps - 1:
                done = gap < HIT_DISTANCE
                rays.append(ray[done])
                ts.append(t[done])
                keep = (~done & (t < far)).nonzero()[:, 0]
                if not len(keep):
                    break
                ray, t, far = ray[keep], t[keep], far[keep]
                o, d, genes = o[:, keep], d[:, keep], genes.select(keep)
        return torch.cat(rays), torch.cat(ts)

    def _compute_local_span(
        self, o: Tensor, d: Tensor, scene: Tensor, margin: float
    ) -> tuple[Tensor, Tensor]:
        return self.compute_span(
            self.to_local(o, scene, True), self.to_local(d, scene, False), scene, margin
        )

    def compute_shadow(self, p: Tensor, sun: Tensor, scene: Tensor, steps: int = 18) -> Tensor:
        """Sunlight (R,) that reaches the points p past the toy: 0 in full shadow, 1 in the open."""
        light = torch.ones_like(p[0])
        near, far = self._compute_local_span(p, sun, scene, 0.08)
        ray = (near < far).nonzero()[:, 0]
        t, far, visibility = near[ray].clamp_min(0.02), far[ray], light[ray]
        o, d = (
            self.to_local(p[:, ray], scene[ray], True),
            self.to_local(sun[:, ray], scene[ray], False),
        )
        genes = self.genes.select(scene[ray])
        for step in range(steps):
            gap = self.distance(torch.addcmul(o, d, t), genes)
            visibility = torch.minimum(visibility, (9 * gap / t.clamp_min(0.15)).clamp(0, 1))
            t = t + gap.clamp(0.03, 0.3)
            if step % 4 == 3:
                light[ray] = visibility
                keep = ((visibility > 0.02) & (t < far)).nonzero()[:, 0]
                ray, t, far, visibility = ray[keep], t[keep], far[keep], visibility[keep]
                o, d, genes = o[:, keep], d[:, keep], genes.select(keep)
        light[ray] = visibility
        return light

    def compute_contact(self, p: Tensor, scene: Tensor) -> Tensor:
        """Skylight (R,) on ground points: dim close to the toy's foot."""
        local = self.to_local(p, scene, True)
        size = self.size[:, scene] + 0.25
        ray = ((local[0].abs() < size[0]) & (local[2].abs() < size[2])).nonzero()[:, 0]
        light = torch.ones_like(p[0])
        gap = self.distance(local[:, ray], self.genes.select(scene[ray]))
        light[ray] = 0.45 + 0.55 * (gap / 0.22).clamp(0, 1)
        return light

    def compute_surface(self, p: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At points p of the toy: colour (R, 3), normal (3, R), skylight (R,), shininess class
        (R,)."""
        local, genes = self.to_local(p, scene, True), self.genes.select(scene)
        normal = self._compute_normal(local, genes)
        role = find_roles(self.kind, local, genes)
        open_sky = self.distance(local + 0.1 * normal, genes) / 0.1
        role = torch.where((role == MAIN) & self._is_patterned(local, scene), SECOND, role)
        material = torch.where(role <= ACCENT, self.material[scene], 0)
        return (
            self.paints[scene, role],
            self.to_world(normal, scene),
            open_sky.clamp(0.35, 1),
            material,
        )

    def _compute_normal(self, local: Tensor, genes: Genes) -> Tensor:
        corners = torch.tensor(_TETRAHEDRON, device=local.device).T[:, :, None]  # (3, 4, 1)
        taps = [self.distance(local + 0.002 * corners[:, k], genes) for k in range(4)]
        return normalize((corners * torch.stack(taps)).sum(1))

    def _is_patterned(self, local: Tensor, scene: Tensor) -> Tensor:
        """Return where (R,) the pattern shows the second colour: on a third of the body, so that
        the main colour dominates."""
        pattern = self.pattern[scene]
        striped = torch.frac(local[1] / 0.27 + 0.2) < 0.33
        nearest = (local / 0.32 + 0.3).round() - 0.3
        spotted = ((local - nearest * 0.32) ** 2).sum(0) < 0.118**2
        cells = local / 0.22 + torch.tensor([0.37, 0.1, 0.43], device=local.device)[:, None]
        inside = (torch.frac(cells[:2].abs()) - 0.5).abs().amax(0) < 0.42
        checkered = inside & (cells.floor().sum(0) % 2 == 1)
        return (
            ((pattern == 1) & striped) | ((pattern == 2) & spotted) | ((pattern == 3) & checkered)
        )
