"""The truth of the toy world: its subjects can be rendered in any place, so scores have a ceiling and a floor.

ceiling  true renders of the individual in the requested place, from other sides and in other light
floor    renders of another individual of the same kind in the same place
judge    an independent network that reads kind, colour and place from a picture
"""

import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth_moslora.core.config.files import read_json_table
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.evaluation.encoders import Encoders
from dreambooth_moslora.evaluation.protocol import EvaluationPlan
from toybox.drawing.places import PLACES
from toybox.readers import judge
from toybox.render import render
from toybox.world import Scene, Toy, sample_scene, sample_toy

__all__ = ["ToyTruth", "find_truth", "is_known_place"]

VIEWS = 3
"""True renders of each place."""
SUBJECT_FILE = "subject.json"


@dataclass
class ToyTruth:
    """The true appearance of one toy, in pictures of `size_px`."""

    toy: Toy
    encoders: Encoders
    size_px: int = 128
    _views: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def tables(
        self, plan: EvaluationPlan, pictures: list[Image.Image], vectors: Tensor, photos: Tensor
    ) -> dict[str, np.ndarray]:
        """Scores against the truth, (prompts, seeds) or (prompts, views).

        dino_ceiling, dino_floor: DINO to the photos (P, D) of true renders and of other individuals, in the
        requested places. truth: DINO of each generated picture (N, D) to true renders in its place, with its
        own ceiling and floor. clip_t_ceiling, clip_t_floor: CLIP-T of the same renders; CLIP does not see a
        typical "rocket" in an unusual toy, however true its picture. judge_*: whether the judge reads what was
        requested.
        """
        places = [place_in(template) for template in plan.templates]
        seen = {kind: [self._renders(place, kind) for place in places] for kind in ("true", "other")}
        true, others = (torch.stack([dino for dino, _ in seen[kind]]) for kind in seen)
        said = self.encoders.clip_texts(plan.texts)[:, :, None]
        prompt = {kind: torch.stack([clip for _, clip in seen[kind]]) @ said for kind in seen}
        generated = vectors.view(len(places), len(plan.seeds), -1)
        return {
            "dino_ceiling": (true @ photos.T).mean(-1).numpy(),
            "dino_floor": (others @ photos.T).mean(-1).numpy(),
            "clip_t_ceiling": prompt["true"][..., 0].numpy(),
            "clip_t_floor": prompt["other"][..., 0].numpy(),
            "truth": (generated @ true.mT).mean(-1).numpy(),
            "truth_ceiling": among(true).numpy(),
            "truth_floor": (others @ true.mT).mean(-1).numpy(),
            **self._readings(places, pictures, len(plan.seeds)),
        }

    def _renders(self, place: str, kind: str) -> tuple[Tensor, Tensor]:
        """DINO and CLIP vectors (VIEWS, D) of renders at a place: `true` for the subject, `other` for others of
        its kind."""
        key = f"{kind} {place}"
        if key not in self._views:
            rng = random.Random(f"{key} {self.toy}")
            toys = [self.toy if kind == "true" else other_toy(self.toy, rng) for _ in range(VIEWS)]
            pictures = render([view(rng, toy, place) for toy in toys], self.size_px)
            images = [Image.fromarray(p.numpy()) for p in pictures]
            self._views[key] = self.encoders.dino_images(images), self.encoders.clip_images(images)
        return self._views[key]

    def _readings(self, places: list[str], pictures: list[Image.Image], seeds: int) -> dict[str, np.ndarray]:
        if not judge.WEIGHTS.is_file():
            return {}
        images = torch.stack([torch.from_numpy(np.array(p.convert("RGB"))) for p in pictures])
        readings = [r for some in images.split(64) for r in self.judge.read(some)]
        asked = {
            "kind": [self.toy.kind] * len(readings),
            "colour": [self.toy.colour] * len(readings),
            "place": [place for place in places for _ in range(seeds)],
        }
        right = {n: [getattr(r, n) == a for r, a in zip(readings, answers)] for n, answers in asked.items()}
        return {f"judge_{n}": np.array(hits, dtype=float).reshape(len(places), seeds) for n, hits in right.items()}

    @cached_property
    def judge(self) -> judge.Judge:
        return judge.load()


def among(vectors: Tensor) -> Tensor:
    """Mean cosine of each view to the other views of its place: (P, V, D) -> (P, V)."""
    similarities = vectors @ vectors.mT
    views = vectors.shape[1]
    return (similarities.sum(-1) - similarities.diagonal(dim1=1, dim2=2)) / (views - 1)


def view(rng: random.Random, toy: Toy, place: str) -> Scene:
    return sample_scene(rng, toy, place, held_out=None)


def other_toy(toy: Toy, rng: random.Random) -> Toy:
    """Another individual of the same kind."""
    return sample_toy(rng, toy.kind)


def place_in(template: str) -> str:
    """The toy world's place that a prompt names."""
    return max((place for place in PLACES if place in template), key=len)


def is_known_place(template: str) -> bool:
    return any(place in template for place in PLACES)


def find_truth(photos_dir: Path, encoders: Encoders, size_px: int = 128) -> ToyTruth | None:
    """The truth about a folder of toy photos, whose `subject.json` names the toy. None for ordinary photos.
    Raises UserError."""
    path = Path(photos_dir) / SUBJECT_FILE
    if not path.is_file():
        return None
    facts = read_json_table(path)
    if "toy" not in facts:
        return None
    try:
        return ToyTruth(Toy.from_dict(facts["toy"]), encoders, size_px)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its toy is not one of the toy world's ({type(error).__name__}: {error}).") from error
