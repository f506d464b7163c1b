"""Truth of the toy world: its subjects can be rendered in any place, so scores have a ceiling and a
floor.

ceiling  true renders of the individual in the requested place, from other sides and in other light
floor    renders of another individual of the same kind in the same place
judge    an independent network that reads kind, both colours, ornaments and place from a picture

How sharp the toy is (`toybox.measures.sharpness`) has its own ceiling: true renders through the
base's autoencoder.
"""

import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import SUBJECT_FILE, get_assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation.metrics import Encoders
from dreambooth_moslora.evaluation.protocol import EvaluationPlan
from dreambooth_moslora.photos.toy_readers import ToySegmenter, load_segmenter_net
from toybox.data.renders import to_pixels, to_uint8
from toybox.measures.sharpness import measure_sharpness
from toybox.readers import judge
from toybox.render import render, render_masks
from toybox.world import PLACES, Scene, Toy, sample_scene, sample_toy

VIEWS = 3
"""True renders of each place."""


class RenderedPlace(NamedTuple):
    """Images uint8 (N,H,W,3) of the toy world, where their toy is, bool (N,H,W), and their unit
    vectors (N,D)."""

    images: Tensor
    masks: Tensor
    dino: Tensor
    clip: Tensor


@dataclass
class ToyTruth:
    """True appearance of one toy, in pictures of `size_px`."""

    toy: Toy
    encoders: Encoders
    size_px: int = 128
    _seen: dict[str, RenderedPlace] = field(default_factory=dict)

    def compute_tables(
        self, plan: EvaluationPlan, pictures: list[Image.Image], vectors: Tensor, photos: Tensor
    ) -> dict[str, np.ndarray]:
        """Scores against the truth, (prompts, seeds) or (prompts, views).

        dino_ceiling, dino_floor: DINO to the photos (P, D) of true renders and of other
        individuals, in the requested places. truth: DINO of each generated picture (N, D) to true
        renders in its place, with its own ceiling and floor. clip_t_ceiling, clip_t_floor: CLIP-T
        of the same renders; CLIP does not see a typical "rocket" in an unusual toy, however true
        its picture. judge_*: whether the judge reads the toy and place that were requested;
        judge_*_ceiling: of true renders. toy_sharpness, toy_sharpness_ceiling: of the generated
        toy, and of true renders through the autoencoder.
        """
        places = [find_place(template) for template in plan.templates]
        features = {
            kind: [self._get_renders(place, kind) for place in places] for kind in ("true", "other")
        }
        true, references = (
            torch.stack([feature.dino for feature in features[kind]]) for kind in features
        )
        text_embeds = self.encoders.embed_clip_texts(plan.texts)[:, :, None]
        prompt = {
            kind: torch.stack([feature.clip for feature in features[kind]]) @ text_embeds
            for kind in features
        }
        generated = vectors.view(len(places), len(plan.seeds), -1)
        return {
            "dino_ceiling": (true @ photos.T).mean(-1).numpy(),
            "dino_floor": (references @ photos.T).mean(-1).numpy(),
            "clip_t_ceiling": prompt["true"][..., 0].numpy(),
            "clip_t_floor": prompt["other"][..., 0].numpy(),
            "truth": (generated @ true.mT).mean(-1).numpy(),
            "truth_ceiling": compute_mutual_similarity(true).numpy(),
            "truth_floor": (references @ true.mT).mean(-1).numpy(),
            **self._compute_readings(places, pictures, len(plan.seeds)),
            **self._compute_sharpness(places, pictures, len(plan.seeds)),
        }

    def _get_renders(self, place: str, kind: str) -> RenderedPlace:
        """Render VIEWS pictures of a place: `true` of the subject, `other` of others of its
        kind."""
        key = f"{kind} {place}"
        if key not in self._seen:
            rng = random.Random(f"{key} {self.toy}")
            toys = [
                self.toy if kind == "true" else sample_other_toy(self.toy, rng)
                for _ in range(VIEWS)
            ]
            scenes = [sample_view(rng, toy, place) for toy in toys]
            images = render(scenes, self.size_px)
            pictures = [Image.fromarray(image.numpy()) for image in images]
            vectors = (
                self.encoders.embed_dino_images(pictures),
                self.encoders.embed_clip_images(pictures),
            )
            self._seen[key] = RenderedPlace(images, render_masks(scenes, self.size_px), *vectors)
        return self._seen[key]

    def _compute_readings(
        self, places: list[str], pictures: list[Image.Image], seeds: int
    ) -> dict[str, np.ndarray]:
        if not judge.WEIGHTS_PATH.is_file():
            return {}
        true = torch.cat([self._get_renders(place, "true").images for place in places])
        answer_hits, ceiling = (
            self._check_answers(places, stack_images(pictures), seeds),
            self._check_answers(places, true, VIEWS),
        )
        return answer_hits | {f"{name}_ceiling": hits for name, hits in ceiling.items()}

    def _check_answers(
        self, places: list[str], images: Tensor, images_per_place: int
    ) -> dict[str, np.ndarray]:
        """Return whether the judge's answers to each question are right, (places,
        images_per_place)."""
        readings = [reading for some in images.split(64) for reading in self.judge.read(some)]
        scenes = [Scene((self.toy,), place) for place in places for _ in range(images_per_place)]
        right = [
            reading.check_answers(scene) for reading, scene in zip(readings, scenes, strict=True)
        ]
        hits = {
            name: np.array([each[name] for each in right], dtype=float) for name in judge.QUESTIONS
        }
        return {
            f"judge_{name}": values.reshape(len(places), images_per_place)
            for name, values in hits.items()
        }

    def _compute_sharpness(
        self, places: list[str], pictures: list[Image.Image], seeds: int
    ) -> dict[str, np.ndarray]:
        images = stack_images(pictures)
        sharpness = measure_sharpness(images, self.segmenter.compute_logits(to_pixels(images)) > 0)
        true = [self._get_renders(place, "true") for place in places]
        ceiling = measure_sharpness(
            self._encode_and_decode(torch.cat([r.images for r in true])),
            torch.cat([r.masks for r in true]),
        )
        return {
            "toy_sharpness": sharpness.view(len(places), seeds).numpy(),
            "toy_sharpness_ceiling": ceiling.view(len(places), VIEWS).numpy(),
        }

    @torch.no_grad()
    def _encode_and_decode(self, images: Tensor) -> Tensor:
        """Images uint8 (N,H,W,3), encoded and decoded by the embedded base's autoencoder."""
        latents = self.vae.encode(to_pixels(images)).latent_dist.mode()
        return to_uint8(self.vae.decode(latents).sample.clamp(-1, 1))

    @cached_property
    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(
            get_assets_folder() / "toy-sdxl", subfolder="vae"
        ).eval()

    @cached_property
    def segmenter(self) -> ToySegmenter:
        return load_segmenter_net(get_assets_folder() / "toy-segmenter")

    @cached_property
    def judge(self) -> judge.Judge:
        return judge.load()


def stack_images(pictures: list[Image.Image]) -> Tensor:
    """uint8 (N,H,W,3)."""
    return torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures])


def compute_mutual_similarity(vectors: Tensor) -> Tensor:
    """Mean cosine of each view to the other views of its place: (P, V, D) -> (P, V)."""
    similarities = vectors @ vectors.mT
    views = vectors.shape[1]
    return (similarities.sum(-1) - similarities.diagonal(dim1=1, dim2=2)) / (views - 1)


def sample_view(rng: random.Random, toy: Toy, place: str) -> Scene:
    return sample_scene(rng, toy, place, held_out=None)


def sample_other_toy(toy: Toy, rng: random.Random) -> Toy:
    """Another individual of the same kind."""
    return sample_toy(rng, toy.kind)


def find_place(template: str) -> str:
    """Find the toy world's place that a prompt names."""
    return max((place for place in PLACES if place in template), key=len)


def is_known_place(template: str) -> bool:
    return any(place in template for place in PLACES)


def find_truth(photos_dir: Path, encoders: Encoders, size_px: int = 128) -> ToyTruth | None:
    """Find the truth about a folder of toy photos, whose `subject.json` names the toy. None for
    ordinary photos. Raises UserError."""
    path = Path(photos_dir) / SUBJECT_FILE
    if not path.is_file():
        return None
    facts = read_json(path)
    if "toy" not in facts:
        return None
    try:
        return ToyTruth(Toy.from_dict(facts["toy"]), encoders, size_px)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its toy is not one of the toy world's ({type(error).__name__}: {error})."
        ) from error
