"""Several subjects in one run: equal exposures at each position, each with its class; alone, a subject is as it was."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from dreambooth_moslora.adapters.export import load_published
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.captions import MadeCaption, keep
from dreambooth_moslora.photos.crops import CropRule, crop_rule, plans_of
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.masks import kept_path
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.plan.memory import BaseSize, estimate
from dreambooth_moslora.plan.plan import plan_steps
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.photo_stream import PhotoStream, SubjectStreams, instance_streams
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny_training import paint_photos, tiny_config
from tests.training.test_buckets import BUCKETS, SIZES, Numbers

pytestmark = pytest.mark.usefixtures("few_steps")

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


def views(stream, count):
    return [stream.at(position)[0] for position in range(count)]


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
