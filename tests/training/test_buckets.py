"""`--enable_bucket`: rectangles in the photos' shapes, batches of one size, each photo shown as often as any other."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dreambooth_moslora.core import place_of
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.photos.crops import CropRule, bucket_of, crop_rule, plans_of
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.photo_stream import PhotoStream
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")

SIZES = [(96, 64), (64, 80), (72, 72), (90, 60), (70, 71), (300, 200), (64, 64)]
BUCKETS = CropRule(64, crops_per_photo=2, bucket_step_px=8)


class Numbers:
    """An encoder that gives the photo and the plan."""

    def __init__(self, rule):
        self.rule = rule

    def encode(self, photo, plan):
        return photo.path, plan


def stream(batch_size, rule=BUCKETS, sizes=SIZES, repeats=1):
    photos = [Photo(number, size, ("x",)) for number, size in enumerate(sizes)]
    return PhotoStream(photos, Numbers(rule), 3, "instance", repeats, batch_size=batch_size)


def views(stream, count):
    return [stream.at(position)[0] for position in range(count)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1500, 1000), (1216, 832)),
        ((1000, 1500), (832, 1216)),
        ((1080, 1920), (768, 1344)),
        ((3000, 4000), (896, 1152)),
        ((3000, 300), (2048, 512)),
    ],
)
def test_the_bucket_is_the_nearest_shape_of_sdxls_own(size, bucket):
    """These sizes are among those that SDXL was trained on (Podell et al. 2023, appendix I)."""
    assert bucket_of(size, 1024, 64) == bucket


def test_crops_cover_their_bucket_and_lie_within_the_photo():
    draws = random.Random(1)
    for _ in range(300):
        size = draws.randint(30, 900), draws.randint(30, 900)
        target = bucket_of(size, 128, 8)
        plan = CropRule(128, zoom=draws.choice([1, 2])).plan(size, draws, target)
        assert plan.target_size == target and plan.time_ids[4:] == target and target[0] * target[1] <= 128**2
        for start, crop, whole in zip(plan.crop_top_left, target, plan.resized, strict=True):
            assert start >= 0 and start + crop <= whole
        assert min(r / t for r, t in zip(plan.resized, target, strict=True)) < 2.01


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_batch_has_one_size_and_each_photo_is_shown_as_often(batch_size, repeats):
    shown = stream(batch_size, repeats=repeats)
    count = len(shown) * batch_size
    found = views(shown, 2 * count)
    sizes = [plan.target_size for _, plan in found]
    assert len(set(sizes)) > 2
    assert all(len(set(sizes[start : start + batch_size])) == 1 for start in range(0, len(sizes), batch_size))
    for half in (found[:count], found[count:]):
        assert set(Counter(photo for photo, _ in half).values()) == {batch_size * repeats}
    assert [shown.at(position)[0] for position in reversed(range(2 * count))] == found[::-1]
    assert found[:count] != found[count:]


@pytest.mark.parametrize("rule", [BUCKETS, CropRule(64, crops_per_photo=2), CropRule(64, crops_per_photo=3)])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 20, 200])
def test_what_is_encoded_ahead_is_what_is_shown(rule, batch_size, count):
    shown = stream(batch_size, rule)
    ahead = [(photo.path, plan) for photo, plan in shown.views_ahead(count)]
    assert set(ahead) == set(views(shown, count)) and len(ahead) <= count


@pytest.mark.parametrize("batch_size", [1, 4])
def test_squares_come_in_the_order_that_they_always_had(batch_size):
    shown = stream(batch_size, CropRule(64))
    places = [place_of(position, len(SIZES), 3, "instance")[1] for position in range(50)]
    assert [photo for photo, _ in views(shown, 50)] == places


def test_the_crop_picture_shows_them(tmp_path):
    config = TrainConfig(resolution=64, seed=3, enable_bucket=True, crops_per_photo=2)
    photos = [Photo(number, size, ("x",)) for number, size in enumerate(SIZES)]
    shown = {plan for number, photo in enumerate(photos) for plan in plans_of(photo, number, config)}
    assert crop_rule(config) == BUCKETS and shown == {plan for _, plan in views(stream(2), 100)}


def test_a_dry_run_names_the_sizes(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    config = tiny_config(tiny_base, photos, tmp_path / "run", enable_bucket=True, bucket_reso_steps=16)
    assert "cropped to 64 x 64 px (2), 80 x 48 px (1)" in describe_run(config)
    prior = {"with_prior_preservation": True, "num_class_images": 10}
    assert "in the same proportion: 64 x 64 px (7), 80 x 48 px (3)" in describe_run(replace(config, **prior))


def test_each_step_that_is_taken_leaves_a_rectangle():
    for step in range(8, 72, 8):
        height, width = bucket_of((300, 200), 64, step)
        assert 0 < height * width <= 64**2


@pytest.mark.parametrize("rule", [BUCKETS, CropRule(64, crops_per_photo=None, bucket_step_px=8)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_class_images_have_the_size_of_what_they_stand_beside(rule, batch_size):
    shown = stream(batch_size, rule)
    shapes = [(64, 64), (48, 80), (80, 48), (80, 48), (50, 50)]  # none like that of (64, 80)
    photos = [Photo(number, size, ("x",)) for number, size in enumerate(shapes)]
    prior = PhotoStream(photos, Numbers(rule), 3, "prior", beside=shown)
    pairs = list(zip(views(shown, 300), views(prior, 300), strict=True))
    assert all(plan.target_size == other.target_size for (_, plan), (_, other) in pairs)
    assert {photo for _, (photo, _) in pairs} == set(range(5))
    for height, width in ((48, 80), (80, 48)):
        whole = {photo for _, (photo, plan) in pairs if plan.target_size == (height, width)}
        assert whole <= {number for number, shape in enumerate(shapes) if shape == (height, width)}
    ahead = [(photo.path, plan) for photo, plan in prior.views_ahead(300)]
    assert set(ahead) == (set(views(prior, 300)) if rule.crops_per_photo else set())


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["adapter_off", "class_images"])
def test_a_training_sees_every_size_with_its_own_numbers(prior, tiny_base, tmp_path, monkeypatch):
    seen, batch_at = [], TrainStep.batch_at
    monkeypatch.setattr(TrainStep, "batch_at", lambda *words: seen.append(batch_at(*words)) or seen[-1])
    options = {"enable_bucket": True, "with_prior_preservation": True, "prior": prior, "train_batch_size": 2}
    events = []
    photos = paint_photos(tmp_path / "photos")
    train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=6, **options), events.append)
    sizes = {tuple(batch.latents.shape[-2:]) for batch in seen}
    assert len(sizes) == 3
    for batch in seen:
        height, width = (8 * side for side in batch.latents.shape[-2:])
        assert torch.equal(batch.time_ids[:, 4:], torch.tensor([[height, width]] * 4, dtype=torch.float32))
    assert len([event for event in events if isinstance(event, StepDone)]) == 6
    made = sorted((tmp_path / "run" / "class_images").glob("*.png"))
    assert {Image.open(path).size for path in made} == ({(80, 48), (56, 72), (64, 64)} if made else set())
    assert len(made) == (3 if prior == "class_images" else 0)
