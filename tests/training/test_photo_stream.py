"""Which photo, crop and caption each exposure shows: buckets, captions that vary, several subjects."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreambooth_moslora.adapters.export import load_published
from dreambooth_moslora.core import place_of
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.captions import MadeCaption, keep
from dreambooth_moslora.photos.crops import CropRule, bucket_of, crop_rule, plans_of
from dreambooth_moslora.photos.folder import ORDERS, bare_prompt_line, photo_report, shuffled_captions
from dreambooth_moslora.photos.masks import kept_path
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.plan.memory import BaseSize, estimate
from dreambooth_moslora.plan.plan import plan_steps
from dreambooth_moslora.settings.sources import recipe_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.photo_stream import PhotoStream, SubjectStreams, instance_streams
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


TAGS = "sks dog, red collar, on grass, side view"


def config(**changes):
    return TrainConfig(**{"seed": 3, "instance_prompt": "a photo of sks dog"} | changes)


class Nothing:
    """An encoder whose pictures nobody looks at."""

    class rule:  # noqa: N801
        crops_per_photo = 1

        @staticmethod
        def target(size_px):
            return size_px

        @staticmethod
        def plan(size_px, draws, target):
            return None

    def encode(self, photo, plan):
        return photo


def worded(captions, dropout=0.0, name="instance", bare_prompt=None, share=0.0):
    photos = [Photo(name, (64, 64), captions, bare_prompt=bare_prompt) for name in ("a.png", "b.png")]
    return PhotoStream(photos, Nothing(), 3, name, 1, dropout, bare_share=share)


def said(shown, count=200):
    return [shown.at(position)[1] for position in range(count)]


def test_prefix_and_suffix_stand_around_a_photos_own_captions(tmp_path):
    photos = paint_photos(tmp_path, count=2)
    (photos / "0.txt").write_text("on grass\nin snow\n")
    framed = photo_report(
        config(instance_data_dir=str(photos), resolution=64, caption_prefix="sks dog,", caption_suffix=", photo")
    )
    assert framed.photos[0].captions == ("sks dog, on grass, photo", "sks dog, in snow, photo")
    assert framed.photos[1].captions == ("a photo of sks dog",)


def test_tags_change_places_and_the_kept_ones_stay():
    found = shuffled_captions(config(shuffle_caption=True, keep_tokens=1), (TAGS,))
    assert len(found) == ORDERS and found[0] == TAGS and len(set(found)) > 3
    assert all(caption.startswith("sks dog, ") for caption in found)
    assert {tuple(sorted(caption.split(", "))) for caption in found} == {tuple(sorted(TAGS.split(", ")))}
    moved = shuffled_captions(config(shuffle_caption=True), (TAGS,))
    assert not all(caption.startswith("sks dog") for caption in moved)
    assert shuffled_captions(config(), (TAGS,)) == (TAGS,)


def test_prefix_and_suffix_stay_whatever_is_shuffled():
    ends = {"caption_prefix": "sks dog,", "caption_suffix": ", in the style of a photo"}
    framed = "sks dog, red, blue, green, in the style of a photo"
    found = shuffled_captions(config(shuffle_caption=True, **ends), (framed, "sks dog,"))
    assert found[0] == framed and len(set(found[:ORDERS])) > 3 and set(found[ORDERS:]) == {"sks dog,"}
    assert all(c.startswith("sks dog, ") and c.endswith(", in the style of a photo") for c in found[:ORDERS])


def test_an_instance_prompt_has_no_prefix_that_could_be_taken_from_it():
    prompt = {"instance_prompt": "sks dog", "caption_prefix": "sks dog", "caption_suffix": "sks dog"}
    assert set(shuffled_captions(config(shuffle_caption=True, **prompt), ("sks dog",))) == {"sks dog"}


def test_a_prefix_with_a_space_before_its_comma_stays_in_front(tmp_path):
    photos = paint_photos(tmp_path, count=1)
    (photos / "0.txt").write_text("red, blue, green\n")
    spaced = config(instance_data_dir=str(photos), resolution=64, shuffle_caption=True, caption_prefix="sks dog ,")
    (photo,) = photo_report(spaced).photos
    assert all(caption.startswith("sks dog, ") for caption in shuffled_captions(spaced, photo.captions))


def test_orders_are_named_by_the_seed():
    orders = [shuffled_captions(config(shuffle_caption=True, seed=seed), (TAGS,)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_each_caption_is_drawn_as_often_as_without_shuffling():
    short, many = "sks dog", shuffled_captions(config(shuffle_caption=True), (TAGS, "sks dog"))
    assert Counter(said(worded(many)))[short] == pytest.approx(100, abs=40)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_exposures_has_no_caption_at_the_same_places_each_time(share):
    texts = said(worded((TAGS,), share))
    assert texts.count("") == pytest.approx(200 * share, abs=30 if 0 < share < 1 else 0)
    again = worded((TAGS,), share)
    assert [again.at(position)[1] for position in reversed(range(200))] == texts[::-1]


PLACED, BARE = ("a photo of sks dog on grass", "a photo of sks dog in snow"), "a photo of sks dog"


def photos_with(folder, *captions, **changes):
    """Painted photos, each with one of these texts beside it, as a run reads them."""
    photos = paint_photos(folder, count=len(captions))
    for number, text in enumerate(captions):
        (photos / f"{number}.txt").write_text(text)
    return photo_report(config(instance_data_dir=str(photos), resolution=64, **changes)).photos


def test_the_bare_prompt_is_of_photos_whose_captions_lack_it(tmp_path):
    texts = (PLACED[0], f"{PLACED[0]}\n{BARE}", "A photo  of SKS dog.", "")
    found = photos_with(tmp_path, *texts, caption_prefix="look:")
    assert [photo.bare_prompt for photo in found] == [BARE, None, BARE, None]  # a prefix makes it another prompt
    assert photos_with(tmp_path, *texts)[2].bare_prompt is None


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 1.0])
def test_a_share_of_exposures_has_the_bare_prompt_at_the_same_places_each_time(share):
    bare = worded(PLACED, bare_prompt=BARE, share=share)
    texts = said(bare, 600)
    assert texts.count(BARE) == pytest.approx(600 * share, abs=45 if 0 < share < 1 else 0)
    assert [bare.at(position)[1] for position in reversed(range(600))] == texts[::-1]
    others = [pair for pair in zip(texts, said(worded(PLACED), 600)) if pair[0] != BARE]
    assert all(with_share == without for with_share, without in others)
    assert bare.captions == ({*PLACED, BARE} if share else {*PLACED})


def test_a_caption_that_is_left_out_is_not_replaced_by_the_bare_prompt():
    texts = said(worded(PLACED, dropout=0.5, bare_prompt=BARE, share=0.5), 600)
    assert texts.count("") == said(worded(PLACED, dropout=0.5), 600).count("") and texts.count(BARE) < 200


def test_photos_with_the_bare_prompt_among_their_captions_keep_every_draw():
    assert said(worded((*PLACED, BARE), share=1.0)) == said(worded((*PLACED, BARE)))


def test_a_data_sets_captions_are_used_as_they_are_unless_a_share_is_given():
    column = {"dataset_name": "dogs", "caption_column": "text"}
    assert config().bare_share == pytest.approx(1 / 3) and config(**column).bare_share == 0
    assert (
        config(**column, instance_prompt_share=0.2).bare_share == 0.2
        and config(instance_prompt_share=0).bare_share == 0
    )


def test_a_file_tells_the_share_only_if_it_was_given():
    assert "instance_prompt_share" not in recipe_of(config())
    assert recipe_of(config(instance_prompt_share=0))["instance_prompt_share"] == 0


def test_one_line_says_what_the_captions_lack(tmp_path):
    photos = photos_with(tmp_path, PLACED[0], BARE)
    line = "captions: 1 of 2 photos have none that is the instance prompt itself; "
    assert bare_prompt_line(config(), photos) == f"{line}33% of their exposures show it (--instance_prompt_share)"
    never = bare_prompt_line(config(instance_prompt_share=0), photos)
    assert never == f"{line}they are never shown with it (--instance_prompt_share)"
    assert bare_prompt_line(config(), photos[1:]) is None


DOG = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}

SQUARES = CropRule(64)

CAT = {"instance_prompt": "a photo of zwx cat", "class_prompt": "a photo of a cat"}


@pytest.fixture
def tables(tmp_path):
    """Three photos of a dog and one of a cat."""
    dog, cat = paint_photos(tmp_path / "dog"), paint_photos(tmp_path / "cat", 1)
    return [{"instance_data_dir": str(dog), **DOG}, {"instance_data_dir": str(cat), **CAT}]


@pytest.fixture
def several(tiny_base, tables, tmp_path):
    def config(output="run", **changes):
        return tiny_config(tiny_base, None, tmp_path / output, **{"subjects": tables, **changes})

    return config


def streams(rule=SQUARES, batch_size=1, counts=(5, 1, 3)):
    found = []
    for number, count in enumerate(counts):
        photos = [Photo((number, n), SIZES[n], ("x",), subject=number) for n in range(count)]
        found.append(PhotoStream(photos, Numbers(rule), 3, str(number), batch_size=batch_size))
    return SubjectStreams(found, 3, batch_size if batch_size > 1 else 1)


def test_each_subject_is_shown_equally_often_whatever_its_number_of_photos():
    shown = streams()
    subjects = [path[0] for path, _ in views(shown, 90)]
    assert subjects == [shown.subject_at(position) for position in range(90)]
    assert all(sorted(subjects[start : start + 3]) == [0, 1, 2] for start in range(0, 90, 3))
    assert len({tuple(subjects[start : start + 3]) for start in range(0, 90, 3)}) > 3
    photos = Counter(path for path, _ in views(shown, 90))
    assert [photos[0, n] for n in range(5)] == [6] * 5 and photos[1, 0] == 30 and photos[2, 1] == 10


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_batch_of_one_size_is_of_one_subject(batch_size):
    shown = streams(BUCKETS, batch_size)
    found = views(shown, 60 * batch_size)
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        assert len({path[0] for path, _ in batch}) == len({plan.target_size for _, plan in batch}) == 1
    assert set(Counter(path[0] for path, _ in found).values()) == {20 * batch_size}


@pytest.mark.parametrize("count", [1, 7, 40])
def test_what_is_encoded_ahead_covers_what_is_shown(count):
    shown = streams(CropRule(64, crops_per_photo=2))
    ahead = [(photo.path, plan) for photo, plan in shown.views_ahead(count)]
    assert set(views(shown, count)) <= set(ahead) and len(ahead) <= count + 2


def test_one_subjects_stream_is_the_one_that_it_always_was():
    photos = [Photo(n, size, ("x", "y")) for n, size in enumerate(SIZES)]
    config = TrainConfig(resolution=64, seed=3, train_batch_size=2, caption_dropout=0.2)
    before = PhotoStream(photos, Numbers(CropRule(64)), 3, "instance", 1, 0.2, 2)
    now = instance_streams(config, photos, Numbers(CropRule(64)))
    assert [now.at(n) for n in range(50)] == [before.at(n) for n in range(50)]


def test_the_crop_pictures_of_each_subject_are_those_of_the_run(several):
    config = several(seed=5, crops_per_photo=2, crop_zoom=1.5)
    photos = photo_report(config).photos
    trained = set(views(instance_streams(config, photos, Numbers(crop_rule(config))), 60))
    numbered = ((0, photos[0]), (1, photos[1]), (2, photos[2]), (0, photos[3]))
    assert trained == {(photo.path, plan) for number, photo in numbered for plan in plans_of(photo, number, config)}


def test_steps_are_counted_for_the_subject_with_the_most_photos():
    plan = plan_steps(TrainConfig(exposures_per_photo=40, train_batch_size=4), (5, 2))
    assert plan.total_steps == 100 and plan.exposures_a_photo == 40 and plan.exposures_a_subject == 200
    assert plan_steps(TrainConfig(num_train_epochs=2, train_batch_size=1), (5, 2)).total_steps == 20


def test_photos_know_their_subject_and_their_masks_do_not_meet(several):
    photos = photo_report(several()).photos
    assert [photo.subject for photo in photos] == [0, 0, 0, 1] and photos[3].captions == ("a photo of zwx cat",)
    assert len({kept_path(photo, RunDir("run").masks_dir) for photo in photos}) == 4


def test_a_dry_run_lists_the_subjects_and_how_often_each_is_seen(several):
    said = describe_run(several(exposures_per_photo=10, max_train_steps=None, with_prior_preservation=True))
    assert "2 subjects, 3 + 1 photos × 1 repeats, 1 a step" in said and "60 steps" in said
    assert "“a photo of sks dog”: token “sks”, class “dog”, 3 photos seen about 10 times each" in said
    assert "“a photo of zwx cat”: token “zwx”, class “cat”, 1 photos seen about 30 times each" in said
    assert "class images to “a photo of a dog”, “a photo of a cat”" in said


def test_the_disk_is_estimated_for_the_class_images_and_samples_of_each(several, tables):
    settings = {"with_prior_preservation": True, "num_class_images": 100_000, "max_train_steps": 1}
    one, two = (
        estimate(config, BaseSize(), 1).disk_gib
        for config in (several(subjects=tables[:1], **settings), several(**settings))
    )
    assert two / one > 1.5


@pytest.mark.slow
def test_the_answer_that_is_preserved_is_of_each_samples_own_class(several, monkeypatch):
    seen, batch_at = [], TrainStep.batch_at
    monkeypatch.setattr(TrainStep, "batch_at", lambda *words: seen.append(batch_at(*words)) or seen[-1])
    train(several(with_prior_preservation=True, prior="adapter_off", max_train_steps=2, train_batch_size=2))
    classes = {DOG["instance_prompt"]: DOG["class_prompt"], CAT["instance_prompt"]: CAT["class_prompt"]}
    for batch in seen:
        assert [classes[prompt] for prompt in batch.prompts[:2]] == batch.prompts[2:]
        assert set(batch.prompts[:2]) == set(classes)


@pytest.mark.slow
def test_one_table_trains_the_very_file_that_flags_train(tiny_base, several, tables, tmp_path):
    train(several("one/dog", subjects=tables[:1], with_prior_preservation=True, max_train_steps=2))
    flags = {"with_prior_preservation": True, "max_train_steps": 2}
    train(tiny_config(tiny_base, tmp_path / "dog", tmp_path / "two" / "dog", **DOG, **flags))
    for name in ("pytorch_lora_weights.safetensors", "dog.kohya.safetensors", "README.md"):
        assert (tmp_path / "one" / "dog" / name).read_bytes() == (tmp_path / "two" / "dog" / name).read_bytes()


@pytest.mark.slow
def test_a_run_of_two_names_both(several, tmp_path):
    train(several(with_prior_preservation=True, num_validation_images=1, max_train_steps=1))
    run = RunDir(tmp_path / "run")
    facts = load_published(run.adapter_path)[1]
    assert facts.subject_prompts == (DOG["instance_prompt"], CAT["instance_prompt"])
    assert facts.trigger_words == ("sks dog", "zwx cat")
    card = run.read_card()
    assert "# run: an SDXL adapter for “a photo of sks dog” and “a photo of zwx cat”" in card
    assert "![a photo of a sks dog and a zwx cat]" in card
    assert len([*run.class_images_dir.glob("*.png")]) == 6


def test_the_masks_of_each_subject_are_found_again(several):
    config = several(masks="auto", mask_prompt="animal")
    photos = photo_report(config).photos
    for number in (0, 3):
        path = kept_path(photos[number], RunDir(config.output_dir).masks_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[number].path, path)
    masked = [photo.mask_path is not None for photo in photo_report(config).photos]
    assert masked == [True, False, False, True]


def test_the_made_captions_of_each_subject_do_not_meet(several):
    config = several(captions="auto")
    photos, path = photo_report(config).photos, RunDir(config.output_dir).captions_path
    for photo in (photos[0], photos[3]):
        keep(path, MadeCaption(photo, f"caption of {photo.subject}", key="key"), "")
    captions = [photo.captions for photo in photo_report(config).photos]
    assert captions[0] == ("caption of 0",) and captions[3] == ("caption of 1",)
    assert captions[1] == ("a photo of sks dog",)


def test_the_others_take_the_turns_of_a_photo_that_is_left_out_and_all_else_stays():
    photos = [Photo(Path(f"{number}.png"), (64, 64), ("x",)) for number in range(4)]

    def shown(left_out: str) -> list:
        config = TrainConfig(seed=3, leave_out=(left_out,))
        kept = [photo for photo in photos if photo.path.name != left_out]
        stream = instance_streams(config, kept, Numbers(SQUARES))
        return [stream.at(position)[0] for position in range(12 * 5)]

    first, last = shown("0.png"), shown("3.png")
    assert set(Counter(path.name for path, _ in first).values()) == {20}
    differing = [(one, other) for one, other in zip(first, last, strict=True) if one[0] != other[0]]
    assert len(differing) == 30, "the turns of the first and of the last, which are a quarter each"
    assert all(one[0].name == "3.png" or other[0].name == "0.png" for one, other in differing)
