"""Photo, crop and caption of each sample: buckets, varied captions, several subjects."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.augment import CropRule, build_crop_rule, choose_bucket
from dreambooth_moslora.photos.caption_variants import (
    TAG_ORDERS,
    describe_bare_prompts,
    shuffle_captions,
)
from dreambooth_moslora.photos.captions import GeneratedCaption, save_caption
from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.photos.photo_file import Photo, get_saved_mask_path
from dreambooth_moslora.photos.quality import plan_crops
from dreambooth_moslora.seeds import shuffle_index
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.training.dataset import (
    PhotoDataset,
    SubjectsDataset,
    build_instance_dataset,
    move_tensors,
)
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.folding import load_published
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")
SIZES = [(96, 64), (64, 80), (72, 72), (90, 60), (70, 71), (300, 200), (64, 64)]
SQUARES, BUCKETS = CropRule(64), CropRule(64, crops_per_photo=2, bucket_step_px=8)
TAGS = "sks dog, red collar, on grass, side view"
PLACED, BARE = ("a photo of sks dog on grass", "a photo of sks dog in snow"), "a photo of sks dog"
DOG = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
CAT = {"instance_prompt": "a photo of zwx cat", "class_prompt": "a photo of a cat"}


class PlanEncoder:
    """Encoder that returns the photo and the crop plan."""

    def __init__(self, rule):
        self.rule = rule

    def encode(self, photo, plan):
        return photo.path, plan


def build_photos(sizes):
    return [Photo(number, size, ("x",)) for number, size in enumerate(sizes)]


def build_dataset(batch_size, rule=BUCKETS, repeats=1):
    return PhotoDataset(
        build_photos(SIZES), PlanEncoder(rule), 3, "instance", repeats, batch_size=batch_size
    )


def list_planned_crops(build_dataset, count):
    return [(photo.path, plan) for photo, plan in build_dataset.list_crops(count)]


def list_samples(build_dataset, count):
    return [build_dataset[position][0] for position in range(count)]


@pytest.mark.parametrize(("kind", "is_pinned"), [("cuda", True), ("mps", False)])
def test_batch_moves_in_one_copy_asynchronous_only_when_pinned(kind, is_pinned, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    batch = {"latents": torch.rand(2, 3), "mask": None, "steps": torch.tensor([7, 9])}
    moved = move_tensors(batch, torch.device(kind))
    assert cuda.copies == [(is_pinned, is_pinned)]
    assert moved["mask"] is None and torch.equal(moved["latents"], batch["latents"])
    assert moved["steps"].tolist() == [7, 9] and moved["steps"].dtype == torch.int64


def test_bucket_is_the_nearest_shape_and_crops_cover_it():
    """These sizes are among those that SDXL was trained on (Podell et al. 2023, appendix I)."""
    sizes = [(1024, 1024), (1500, 1000), (1000, 1500), (1080, 1920), (3000, 4000), (3000, 300)]
    buckets = [(1024, 1024), (1216, 832), (832, 1216), (768, 1344), (896, 1152), (2048, 512)]
    assert [choose_bucket(size, 1024, 64) for size in sizes] == buckets
    for step in range(8, 72, 8):
        height, width = choose_bucket((300, 200), 64, step)
        assert 0 < height * width <= 64**2
    draws = random.Random(1)
    for _ in range(300):
        size = draws.randint(30, 900), draws.randint(30, 900)
        target = choose_bucket(size, 128, 8)
        plan = CropRule(128, zoom=draws.choice([1, 2])).plan_crop(size, draws, target)
        assert plan.target_size == plan.time_ids[4:] == target and target[0] * target[1] <= 128**2
        edges = zip(plan.crop_top_left, target, plan.resized, strict=True)
        assert all(0 <= start <= start + crop <= whole for start, crop, whole in edges)
        assert min(r / t for r, t in zip(plan.resized, target, strict=True)) < 2.01


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("repeats", [1, 2])
def test_batch_has_one_size_and_photos_are_shown_equally_often(batch_size, repeats):
    dataset = build_dataset(batch_size, repeats=repeats)
    count = len(dataset) * batch_size
    crops = list_samples(dataset, 2 * count)
    sizes = [plan.target_size for _, plan in crops]
    assert len(set(sizes)) > 2
    assert all(
        len(set(sizes[start : start + batch_size])) == 1
        for start in range(0, len(sizes), batch_size)
    )
    for half in (crops[:count], crops[count:]):
        assert set(Counter(photo for photo, _ in half).values()) == {batch_size * repeats}
    assert [dataset[position][0] for position in reversed(range(2 * count))] == crops[::-1]
    assert crops[:count] != crops[count:]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_epoch_shows_each_photo_in_each_resolution(batch_size):
    rule = CropRule(64, more_resolutions_px=(48, 32))
    dataset = build_dataset(batch_size, rule)
    assert len(dataset) == 3 * len(SIZES)
    count = len(dataset) * batch_size
    crops = list_samples(dataset, count)
    view_counts = Counter((photo, plan.target_size) for photo, plan in crops)
    sides = [(64, 64), (48, 48), (32, 32)]
    assert view_counts == {(n, side): batch_size for n in range(len(SIZES)) for side in sides}
    for start in range(0, count, batch_size):
        assert len({plan.target_size for _, plan in crops[start : start + batch_size]}) == 1


RULES = [BUCKETS, replace(SQUARES, crops_per_photo=2), replace(SQUARES, crops_per_photo=3)]


@pytest.mark.parametrize("rule", [*RULES, replace(BUCKETS, more_resolutions_px=(32,))])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 20, 200])
def test_planned_crops_are_the_crops_of_the_samples(rule, batch_size, count):
    dataset = build_dataset(batch_size, rule)
    ahead = list_planned_crops(dataset, count)
    assert set(ahead) == set(list_samples(dataset, count)) and len(ahead) <= count


@pytest.mark.parametrize("batch_size", [1, 4])
def test_order_of_squares_of_one_subject_is_a_shuffled_epoch(batch_size):
    dataset = build_dataset(batch_size, SQUARES)
    places = [shuffle_index(position, len(SIZES), 3, "instance")[1] for position in range(50)]
    assert [photo for photo, _ in list_samples(dataset, 50)] == places
    photos = [Photo(n, size, ("x", "y")) for n, size in enumerate(SIZES)]
    config = train_config.TrainConfig(
        resolution=64, seed=3, train_batch_size=2, caption_dropout=0.2
    )
    before = PhotoDataset(photos, PlanEncoder(SQUARES), 3, "instance", 1, 0.2, 2)
    now = build_instance_dataset(config, photos, PlanEncoder(SQUARES))
    assert [now[n] for n in range(50)] == [before[n] for n in range(50)]


def test_leave_out_equals_a_folder_without_the_photo():
    photos = [Photo(Path(f"{number}.png"), (64, 64), ("x",)) for number in (0, 1, 3)]

    def stream_of(**changes) -> SubjectsDataset:
        return build_instance_dataset(
            train_config.TrainConfig(seed=3, **changes), photos, PlanEncoder(SQUARES)
        )

    assert list_samples(stream_of(leave_out=("2.png",)), 50) == list_samples(stream_of(), 50)
    assert len(stream_of(leave_out=("2.png",)).list_crops(50)) == 3, "one crop of each photo"


def test_check_shows_the_crops_that_training_takes(several):
    config = train_config.TrainConfig(resolution=64, seed=3, enable_bucket=True, crops_per_photo=2)
    planned_crops = {
        plan
        for number, photo in enumerate(build_photos(SIZES))
        for plan in plan_crops(photo, number, config)
    }
    assert build_crop_rule(config) == BUCKETS and planned_crops == {
        plan for _, plan in list_samples(build_dataset(2), 100)
    }
    config = several(seed=5, crops_per_photo=2, crop_zoom=1.5, random_flip=True, repeats=2)
    photos = build_photo_report(config).photos
    trained = set(
        list_samples(
            build_instance_dataset(config, photos, PlanEncoder(build_crop_rule(config))), 120
        )
    )
    numbered = ((0, photos[0]), (1, photos[1]), (2, photos[2]), (0, photos[3]))
    assert trained == {
        (photo.path, plan)
        for number, photo in numbered
        for plan in plan_crops(photo, number, config)
    }


@pytest.mark.parametrize("rule", [BUCKETS, CropRule(64, crops_per_photo=None, bucket_step_px=8)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_class_images_have_the_size_of_their_instance_sample(rule, batch_size):
    instance = build_dataset(batch_size, rule)
    shapes = [(64, 64), (48, 80), (80, 48), (80, 48), (50, 50)]  # none like that of (64, 80)
    prior = PhotoDataset(build_photos(shapes), PlanEncoder(rule), 3, "prior", size_source=instance)
    pairs = list(zip(list_samples(instance, 300), list_samples(prior, 300), strict=True))
    assert all(plan.target_size == prior_plan.target_size for (_, plan), (_, prior_plan) in pairs)
    assert {photo for _, (photo, _) in pairs} == set(range(5))
    for height, width in ((48, 80), (80, 48)):
        whole = {photo for _, (photo, plan) in pairs if plan.target_size == (height, width)}
        assert whole <= {number for number, shape in enumerate(shapes) if shape == (height, width)}
    assert set(list_planned_crops(prior, 300)) == (
        set(list_samples(prior, 300)) if rule.crops_per_photo else set()
    )


@pytest.fixture
def batches(monkeypatch):
    """Return the batches that the steps load."""
    batches, load_batch = [], TrainStep.load_batch
    monkeypatch.setattr(
        TrainStep,
        "load_batch",
        lambda *arguments: batches.append(load_batch(*arguments)) or batches[-1],
    )
    return batches


def config(**changes):
    return train_config.TrainConfig(
        **{"seed": 3, "instance_prompt": "a photo of sks dog"} | changes
    )


def build_captioned_dataset(captions, dropout=0.0, bare_prompt=None, share=0.0):
    photos = [
        Photo(name, (64, 64), captions, bare_prompt=bare_prompt) for name in ("a.png", "b.png")
    ]
    return PhotoDataset(
        photos, PlanEncoder(SQUARES), 3, "instance", 1, dropout, bare_prompt_share=share
    )


def list_captions(dataset, count=200):
    """Return the captions of the first samples, which are the same in any order."""
    texts = [dataset[position][1] for position in range(count)]
    assert [dataset[position][1] for position in reversed(range(count))] == texts[::-1]
    return texts


def write_captioned_photos(folder, *captions, **changes):
    """Return painted photos, each with one of these texts beside it, as a run reads them."""
    photos = paint_photos(folder, count=len(captions))
    for number, text in enumerate(captions):
        (photos / f"{number}.txt").write_text(text)
    return build_photo_report(
        config(instance_data_dir=str(photos), resolution=64, **changes)
    ).photos


def test_tags_are_shuffled_by_the_seed_and_kept_tokens_stay():
    captions = shuffle_captions(config(shuffle_caption=True, keep_tokens=1), (TAGS,))
    assert len(captions) == TAG_ORDERS and captions[0] == TAGS and len(set(captions)) > 3
    assert all(caption.startswith("sks dog, ") for caption in captions)
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {
        tuple(sorted(TAGS.split(", ")))
    }
    moved = shuffle_captions(config(shuffle_caption=True), (TAGS,))
    assert not all(caption.startswith("sks dog") for caption in moved)
    assert shuffle_captions(config(), (TAGS,)) == (TAGS,)
    orders = [
        shuffle_captions(config(shuffle_caption=True, seed=seed), (TAGS,)) for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    many = shuffle_captions(config(shuffle_caption=True), (TAGS, "sks dog"))
    assert Counter(list_captions(build_captioned_dataset(many)))["sks dog"] == pytest.approx(
        100, abs=40
    )


def test_caption_prefix_comes_first_and_is_not_shuffled(tmp_path):
    first, second = write_captioned_photos(
        tmp_path, "on grass\nin snow\n", "", caption_prefix="sks dog,"
    )
    assert first.captions == ("sks dog, on grass", "sks dog, in snow")
    assert second.captions == ("a photo of sks dog",)
    framed = "sks dog, red, blue, green, in snow"
    prefixed = config(shuffle_caption=True, caption_prefix="sks dog,")
    captions = shuffle_captions(prefixed, (framed, "sks dog,"))
    assert (
        captions[0] == framed
        and len(set(captions[:TAG_ORDERS])) > 3
        and set(captions[TAG_ORDERS:]) == {"sks dog,"}
    )
    assert all(caption.startswith("sks dog, ") for caption in captions[:TAG_ORDERS])


def test_captions_get_the_trigger_word_once(tmp_path):
    texts = "[trigger] on grass\na SKS dog in snow\nasleep\n"
    photo, _ = write_captioned_photos(tmp_path, texts, "", caption_prefix="sks dog")
    assert photo.captions == ("sks dog on grass", "a SKS dog in snow", "sks dog asleep")


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 1.0])
def test_shares_of_empty_captions_and_of_bare_prompts(share):
    for dataset, bare in (
        (build_captioned_dataset((TAGS,), share), ""),
        (build_captioned_dataset(PLACED, bare_prompt=BARE, share=share), BARE),
    ):
        texts = list_captions(dataset, 600)
        assert texts.count(bare) == pytest.approx(600 * share, abs=45 if 0 < share < 1 else 0)
    assert list_captions(build_captioned_dataset((TAGS,), share), 600) == list_captions(
        build_captioned_dataset((TAGS,), share), 600
    )
    pairs = [
        pair
        for pair in zip(texts, list_captions(build_captioned_dataset(PLACED), 600))
        if pair[0] != BARE
    ]
    assert all(with_share == without for with_share, without in pairs)
    assert dataset.captions == ({*PLACED, BARE} if share else {*PLACED})
    texts = list_captions(
        build_captioned_dataset(PLACED, dropout=0.5, bare_prompt=BARE, share=0.5), 600
    )
    assert (
        texts.count("")
        == list_captions(build_captioned_dataset(PLACED, dropout=0.5), 600).count("")
        and texts.count(BARE) < 200
    )
    assert list_captions(build_captioned_dataset((*PLACED, BARE), share=1.0)) == list_captions(
        build_captioned_dataset((*PLACED, BARE))
    )


def test_bare_prompt_is_for_photos_whose_captions_lack_it(tmp_path):
    """The share is a quarter unless it is set."""
    texts = (PLACED[0], f"{PLACED[0]}\n{BARE}", "A photo  of SKS dog.", "")
    photos_read = write_captioned_photos(tmp_path, *texts, caption_prefix="look:")
    # a prefix makes it another prompt
    assert [photo.bare_prompt for photo in photos_read] == [BARE, None, BARE, None]
    assert write_captioned_photos(tmp_path, *texts)[2].bare_prompt is None
    shares = {None: 0.25, 0.2: 0.2, 0: 0}
    for setting, share in shares.items():
        assert config(instance_prompt_share=setting).bare_prompt_share == share
    photos = write_captioned_photos(tmp_path / "two", PLACED[0], BARE)
    line = "captions: 1 of 2 photos have none that is the instance prompt itself; "
    assert (
        describe_bare_prompts(config(), photos)
        == f"{line}25% of their exposures show it (--instance_prompt_share)"
    )
    never = describe_bare_prompts(config(instance_prompt_share=0), photos)
    assert never == f"{line}they are never shown with it (--instance_prompt_share)"
    assert describe_bare_prompts(config(), photos[1:]) is None


@pytest.fixture
def tables(tmp_path):
    """Return the tables of three photos of a dog and one of a cat."""
    dog, cat = paint_photos(tmp_path / "dog"), paint_photos(tmp_path / "cat", 1)
    return [{"instance_data_dir": str(dog), **DOG}, {"instance_data_dir": str(cat), **CAT}]


@pytest.fixture
def several(tiny_base, tables, tmp_path):
    usual = {"subjects": tables}
    return lambda output="run", **changes: tiny_config(
        tiny_base, None, tmp_path / output, **usual | changes
    )


def build_subjects_dataset(rule=SQUARES, batch_size=1, counts=(5, 1, 3)):
    datasets = []
    for number, count in enumerate(counts):
        photos = [Photo((number, n), SIZES[n], ("x",), subject=number) for n in range(count)]
        datasets.append(
            PhotoDataset(photos, PlanEncoder(rule), 3, str(number), batch_size=batch_size)
        )
    return SubjectsDataset(datasets, 3, batch_size)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_subjects_are_shown_equally_often(count):
    dataset = build_subjects_dataset()
    subjects = [path[0] for path, _ in list_samples(dataset, 90)]
    assert subjects == [dataset.get_subject(position) for position in range(90)]
    assert all(sorted(subjects[start : start + 3]) == [0, 1, 2] for start in range(0, 90, 3))
    assert len({tuple(subjects[start : start + 3]) for start in range(0, 90, 3)}) > 3
    photos = Counter(path for path, _ in list_samples(dataset, 90))
    assert [photos[0, n] for n in range(5)] == [6] * 5 and photos[1, 0] == 30 and photos[2, 1] == 10
    dataset = build_subjects_dataset(CropRule(64, crops_per_photo=2))
    ahead = list_planned_crops(dataset, count)
    assert set(list_samples(dataset, count)) <= set(ahead) and len(ahead) <= count + 2


@pytest.mark.parametrize("batch_size", [2, 4])
def test_bucketed_batch_has_one_subject(batch_size):
    dataset = build_subjects_dataset(BUCKETS, batch_size)
    crops = list_samples(dataset, 60 * batch_size)
    for start in range(0, len(crops), batch_size):
        batch = crops[start : start + batch_size]
        assert (
            len({path[0] for path, _ in batch}) == len({plan.target_size for _, plan in batch}) == 1
        )
    assert set(Counter(path[0] for path, _ in crops).values()) == {20 * batch_size}


def test_masks_and_captions_are_kept_for_each_subject(several):
    config = several(masks="auto", mask_prompt="animal", captions="auto")
    photos, run = build_photo_report(config).photos, RunDir(config.output_dir)
    assert [photo.subject for photo in photos] == [0, 0, 0, 1] and photos[3].captions == (
        "a photo of zwx cat",
    )
    assert len({get_saved_mask_path(photo, run.masks_dir) for photo in photos}) == 4
    for photo in (photos[0], photos[3]):
        path = get_saved_mask_path(photo, run.masks_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo.path, path)
        save_caption(
            run.captions_path, GeneratedCaption(photo, f"caption of {photo.subject}", key="key"), ""
        )
    reread = build_photo_report(config).photos
    assert [photo.mask_path is not None for photo in reread] == [True, False, False, True]
    instance_prompt = ("a photo of sks dog",)
    assert [photo.captions for photo in reread] == [
        ("caption of 0",),
        instance_prompt,
        instance_prompt,
        ("caption of 1",),
    ]


@pytest.mark.slow
def test_two_subjects_keep_their_own_class_and_both_are_named(several, batches, tmp_path):
    prior = {"with_prior_preservation": True, "train_batch_size": 2}
    train(several("off", prior="adapter_off", max_train_steps=2, **prior))
    classes = {subject["instance_prompt"]: subject["class_prompt"] for subject in (DOG, CAT)}
    for batch in batches:
        assert [classes[prompt] for prompt in batch.prompts[:2]] == batch.prompts[2:]
        assert set(batch.prompts[:2]) == set(classes)
    train(several(num_validation_images=1, max_train_steps=1, **prior))
    run = RunDir(tmp_path / "run")
    facts, card = load_published(run.adapter_path)[1], run.read_card()
    assert facts.subject_prompts == (DOG["instance_prompt"], CAT["instance_prompt"])
    assert facts.trigger_words == ("sks dog", "zwx cat")
    assert "# run: an SDXL adapter for “a photo of sks dog” and “a photo of zwx cat”" in card
    assert "![a photo of a sks dog and a zwx cat]" in card
    assert len([*run.class_images_dir.glob("*.png")]) == 6


@pytest.mark.slow
def test_one_subject_table_trains_the_file_that_flags_train(tiny_base, several, tables, tmp_path):
    flags = {"with_prior_preservation": True, "max_train_steps": 2}
    train(several("one/dog", subjects=tables[:1], **flags))
    train(tiny_config(tiny_base, tmp_path / "dog", tmp_path / "two" / "dog", **DOG, **flags))
    for name in ("pytorch_lora_weights.safetensors", "dog.kohya.safetensors", "README.md"):
        assert (tmp_path / "one" / "dog" / name).read_bytes() == (
            tmp_path / "two" / "dog" / name
        ).read_bytes()
