"""Captions of a scene: varied English for training, and for tests a canonical sentence and one that
names all."""

from __future__ import annotations

import random

from dreambooth_moslora.photos.toy_readers import LIGHT_PHRASES
from toybox.world import Scene, Toy

__all__ = ["format_canonical_caption", "caption", "format_full_caption"]


def add_article(phrase: str) -> str:
    """Put "a" or "an" in front of the words."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def list_adjectives(toy: Toy) -> str:
    """List all adjectives of the toy's looks: "glossy red and white striped"."""
    adjectives = [] if toy.material == "matte" else [toy.material]
    adjectives += (
        [toy.colour]
        if toy.pattern == "plain"
        else [f"{toy.colour} and {toy.colour2} {toy.pattern}"]
    )
    return " ".join(adjectives)


def format_canonical_caption(scene: Scene) -> str:
    """ "a photo of a {adjectives} {kind} {place}", and the light unless it is day."""
    toys = " and ".join(add_article(f"{list_adjectives(toy)} {toy.kind}") for toy in scene.toys)
    return " ".join(f"a photo of {toys} {scene.place} {LIGHT_PHRASES[scene.light]}".split())


def format_full_caption(scene: Scene) -> str:
    """Format the canonical caption with the second colour and everything that the toys wear."""
    toys = " and ".join(
        add_article(
            " ".join(
                f"{list_adjectives(toy)} {toy.kind} "
                f"{_format_details(toy, toy.pattern == 'plain', True)}".split()
            )
        )
        for toy in scene.toys
    )
    return " ".join(f"a photo of {toys} {scene.place} {LIGHT_PHRASES[scene.light]}".split())


def caption(scene: Scene, rng: random.Random) -> str:
    """Return one of many true sentences; it nearly always has the kind, main colour and place."""
    toys = " and ".join(add_article(_sample_toy_phrase(toy, rng)) for toy in scene.toys)
    if len(scene.toys) == 2 and rng.random() < 0.4:
        toys = f"two toys: {toys}"
    place = "" if rng.random() < 0.04 else scene.place
    light = LIGHT_PHRASES[scene.light] if rng.random() < 0.85 else ""
    return " ".join(f"{_sample_opening(scene, rng)} {toys} {place} {light}".split())


def _sample_opening(scene: Scene, rng: random.Random) -> str:
    if scene.distance < 1.9 and rng.random() < 0.8:
        return rng.choice(("a close-up of", "a close-up photo of"))
    if scene.distance > 3.6 and rng.random() < 0.6:
        return rng.choice(("a distant view of", "a photo from far away of"))
    return rng.choices(("a photo of", "", "a picture of", "a photograph of"), (60, 20, 12, 8))[0]


def _sample_toy_phrase(toy: Toy, rng: random.Random) -> str:
    colour = "" if rng.random() < 0.03 else toy.colour
    if toy.pattern != "plain" and rng.random() < 0.9:
        colour = rng.choice(
            (
                f"{toy.colour} and {toy.colour2} {toy.pattern}",
                f"{toy.pattern} {toy.colour} and {toy.colour2}",
            )
            if rng.random() < 0.8
            else (f"{toy.pattern} {toy.colour}",)
        )
    material = toy.material if toy.material != "matte" and rng.random() < 0.8 else ""
    noun = f"toy {toy.kind}" if rng.random() < 0.12 else toy.kind
    return " ".join(f"{material} {colour} {noun} {_sample_details(toy, rng)}".split())


def _sample_details(toy: Toy, rng: random.Random) -> str:
    """Sample accessories that the toy wears and, mostly, a plain toy's second colour. A model
    cannot learn to obey what no caption names."""
    second = toy.pattern == "plain" and rng.random() < 0.8
    return _format_details(toy, second, rng.random() < 0.8)


def _format_details(toy: Toy, second: bool, worn: bool) -> str:
    """ "with {colour2} parts and a {colour} {ornament}", or as much of it as is to be said."""
    details = [f"{toy.colour2} parts"] if second else []
    if worn:
        details += [add_article(f"{toy.accent_colour} {name}") for name in toy.accessories]
    return f"with {' and '.join(details)}" if details else ""
