"""The measures measured on the toy world, where the truth is known: its own encoders, its photos, its renders."""

import random
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter

from dreambooth_moslora.base.files import TOY
from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.metrics import Encoders, load_encoders
from toybox.captions import canonical_caption
from toybox.make_subjects import FOLDER, load
from toybox.render import render
from toybox.truth import other_toy
from toybox.world import Scene, Toy, sample_scene

pytestmark = pytest.mark.skipif(
    not (TOY / "image_encoder").is_dir() or not (TOY.parent / "toy-dino").is_dir(),
    reason="the embedded base is not in this checkout",
)
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []
NEW_PLACES = ("on lava", "in the snow", "on the moon", "on a purple rug", "in the desert", "on water")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders("toy")


def photos_of(name: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(Path(FOLDER / name).glob("*.jpg"))]


def drawn(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(picture.numpy()) for picture in render(scenes)]


def in_places(toys: list[Toy], seed: int) -> list[Image.Image]:
    rng = random.Random(seed)
    return drawn([sample_scene(rng, toy, place, held_out=None) for toy, place in zip(toys, NEW_PLACES)])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_individual_in_other_places_is_nearer_to_the_photos_than_others_of_its_kind(encoders, name):
    toy, photos = load(name).toy, encoders.dino_images(photos_of(name))
    same = metrics.subject_fidelity(encoders.dino_images(in_places([toy] * 6, 1)), photos)
    rng = random.Random(2)
    others = metrics.subject_fidelity(
        encoders.dino_images(in_places([other_toy(toy, rng) for _ in range(6)], 1)), photos
    )
    assert same.mean() > others.mean() + 0.2


@pytest.mark.slow
def test_shuffled_prompts_lower_clip_t(encoders):
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(40)]
    pictures, texts = encoders.clip_images(drawn(scenes)), encoders.clip_texts([canonical_caption(s) for s in scenes])
    paired = metrics.prompt_fidelity(pictures, texts)
    shuffled = metrics.prompt_fidelity(pictures, texts.roll(1, 0))
    assert (paired > shuffled).float().mean() > 0.9 and paired.mean() > shuffled.mean() + 0.2


def worn(photo: Image.Image) -> Image.Image:
    """The photo as a model that learnt it by heart would draw it: small, soft and a little off."""
    small = photo.resize((128, 128)).filter(ImageFilter.GaussianBlur(1))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=70)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("name", NAMES)
def test_the_copy_alarm_knows_a_worn_photo_from_a_new_picture_of_the_subject(encoders, name):
    def joint(pictures: list[Image.Image]) -> torch.Tensor:
        return metrics.joint_vectors(encoders.clip_images(pictures), encoders.dino_images(pictures))

    photos = photos_of(name)
    fresh = in_places([load(name).toy] * 6, 3)
    assert not metrics.copy_alarm(joint(fresh), joint(photos)).raised
    assert metrics.copy_alarm(joint([worn(photo) for photo in photos]), joint(photos)).share > 0.5
