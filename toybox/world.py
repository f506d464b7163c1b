"""Content of a picture: toys (individuals), scenes, their random sampling, and the held-out
combinations.

Everything here is plain data with a JSON form; `toybox.render` draws it, `toybox.captions`
describes it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from toybox.drawing.kinds import SHAPES
from toybox.drawing.parts import ACCESSORIES, GENES
from toybox.drawing.places import LIGHTS, PLACES, list_lights

__all__ = [
    "COLOURS",
    "KINDS",
    "LIGHTS",
    "MATERIALS",
    "PATTERNS",
    "PLACES",
    "Scene",
    "Toy",
    "is_held_out",
    "sample_scene",
    "sample_toy",
]

KINDS: tuple[str, ...] = tuple(SHAPES)
# name -> sRGB in [0, 1]
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.08, 0.09),
    "orange": (1.00, 0.50, 0.02),
    "yellow": (0.99, 0.88, 0.08),
    "green": (0.10, 0.62, 0.14),
    "teal": (0.02, 0.66, 0.64),
    "blue": (0.09, 0.25, 0.88),
    "purple": (0.50, 0.14, 0.72),
    "pink": (1.00, 0.52, 0.74),
    "brown": (0.45, 0.25, 0.10),
    "white": (0.97, 0.97, 0.96),
    "black": (0.09, 0.09, 0.10),
    "grey": (0.44, 0.45, 0.47),
}
PATTERNS = ("plain", "striped", "spotted", "checkered")
MATERIALS = ("matte", "glossy", "metal")
HELD_OUT_PERCENT = 6
SIGHTS_PER_PLACE = 4  # `Scene.variant` may be any number
SIGHTS_PER_NARROW_PLACE = 2


@dataclass(frozen=True)
class Toy:
    """Individual toy, the same from every side and in every place.

    `colour` covers most of the body, `colour2` the second parts and the pattern. `genes` follow
    `GENES`, around 0. `accent` is the colour of its accessories; None is each accessory's default
    colour.
    """

    kind: str
    colour: str
    colour2: str
    pattern: str = "plain"
    material: str = "matte"
    genes: tuple[float, ...] = (0.0,) * len(GENES)
    accessories: tuple[str, ...] = ()
    accent: str | None = None

    @property
    def accent_colour(self) -> str:
        worn = self.accessories[0] if self.accessories else "flag"
        return self.accent or ACCESSORIES[worn]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Toy:
        return cls(
            **{**data, "genes": tuple(data["genes"]), "accessories": tuple(data["accessories"])}
        )


@dataclass(frozen=True)
class Scene:
    """Content of one picture. Angles are in radians; `distance` is in toy sizes (2.1 fills 74 % of
    the frame, 3.4 46 %)."""

    toys: tuple[Toy, ...]
    place: str
    light: str = "day"
    yaw: float = 0.0
    pitch: float = 0.18
    distance: float = 2.5
    # azimuth from behind the camera, elevation
    sun: tuple[float, float] = field(default=(-0.6, 0.9))
    # of the toy in the frame, in half frames, right and up
    offset: tuple[float, float] = (0.0, 0.0)
    variant: float = 0.0  # in [0, 1): shifts the place's scenery

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        toys = tuple(Toy.from_dict(toy) for toy in data["toys"])
        return cls(
            **{**data, "toys": toys, "sun": tuple(data["sun"]), "offset": tuple(data["offset"])}
        )


def is_held_out(kind: str, colour: str, place: str) -> bool:
    """True for a fixed 6 % of the combinations, which no training picture shows."""
    return zlib.crc32(f"{kind}|{colour}|{place}".encode()) % 100 < HELD_OUT_PERCENT


def sample_toy(rng: random.Random, kind: str | None = None, **fixed: Any) -> Toy:
    """Sample a random individual; `fixed` overrides fields of `Toy`."""
    kind = kind or rng.choice(KINDS)
    colour = rng.choice(list(COLOURS))
    wearable = SHAPES[kind].accessories
    toy = Toy(
        kind=kind,
        colour=colour,
        colour2=rng.choice([second_colour for second_colour in COLOURS if second_colour != colour]),
        pattern=rng.choices(PATTERNS, (64, 12, 12, 12))[0],
        material=rng.choices(MATERIALS, (70, 18, 12))[0],
        genes=tuple(round(rng.triangular(-0.8, 0.8, 0), 3) for _ in GENES),
        accessories=(rng.choice(wearable),) if wearable and rng.random() < 0.2 else (),
    )
    return replace(toy, **fixed)


def sample_scene(
    rng: random.Random,
    toy: Toy | None = None,
    place: str | None = None,
    held_out: bool | None = False,
    narrow: bool = False,
) -> Scene:
    """Sample a random picture, of `toy` at `place` if given.

    `held_out` False never shows a held-out combination, True always does, None allows both.
    `narrow` keeps the camera nearly fixed: a small model that learns from few pictures then draws
    better ones. Raises ValueError when no combination fits.
    """
    for _ in range(10_000):
        toys = (toy or sample_toy(rng),)
        if toy is None and rng.random() < 0.03:
            toys += (sample_toy(rng),)
        where = place or rng.choice(PLACES)
        if held_out is None or held_out == any(is_held_out(t.kind, t.colour, where) for t in toys):
            view = _sample_view(rng, toys, where)
            return _replace_camera(rng, view) if narrow else view
    raise ValueError(
        f"no scene with held_out={held_out} exists for {toy} at {place}: leave one of them free"
    )


def _sample_view(rng: random.Random, toys: tuple[Toy, ...], place: str) -> Scene:
    """Mostly a toy turned a little aside, at its full height: a small model learns only sights that
    it meets often."""
    yaw = rng.uniform(0.2, 0.9) if rng.random() < 0.85 else rng.uniform(-3.1416, 3.1416)
    views = ((2.1, 2.6),) if len(toys) > 1 else ((1.6, 1.9), (1.9, 2.6), (3.5, 4.0))
    near, far = rng.choices(views, (5, 91, 4)[-len(views) :])[0]
    names = list_lights(place)
    light = "day" if rng.random() < 0.7 else rng.choice(names)
    return Scene(
        toys=toys,
        place=place,
        light=light,
        yaw=round(yaw, 3),
        pitch=round(rng.uniform(0.12, 0.26), 3),
        distance=round(rng.uniform(near, far), 3),
        sun=(round(rng.uniform(-0.9, 0.3), 3), round(rng.uniform(0.7, 1.05), 3)),
        offset=(round(rng.uniform(-0.06, 0.06), 3), round(rng.uniform(-0.04, 0.04), 3)),
        variant=rng.randrange(SIGHTS_PER_PLACE) / SIGHTS_PER_PLACE,
    )


def _replace_camera(rng: random.Random, scene: Scene) -> Scene:
    """Show the same toys and light to a camera of one height and aim, which hardly comes nearer,
    and one of two sights of the place. Two toys keep their distance, at which both are in the
    frame."""
    distance = scene.distance if len(scene.toys) > 1 else round(rng.uniform(1.9, 2.3), 3)
    variant = rng.randrange(SIGHTS_PER_NARROW_PLACE) / SIGHTS_PER_NARROW_PLACE
    return replace(scene, pitch=Scene.pitch, offset=(0.0, 0.0), distance=distance, variant=variant)
