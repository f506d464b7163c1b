"""Class images: topped up, with a manifest, and never those of another prompt."""

import json

import pytest
from PIL import Image

from dreambooth_moslora.core import UserError, file_digest
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.class_images import ClassImages, shares
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.made_before import planned, usable_class_photos
from tests.helpers.tiny import tiny_sdxl
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


class Painter:
    """Stands where the base generates: pictures (h, w) that tell their seed."""

    def __init__(self, size_px):
        self.calls, self.size_px = [], size_px

    def __call__(self, prompt, seeds):
        self.calls.append((prompt, tuple(seeds)))
        return [Image.new("RGB", self.size_px[::-1], (seed % 256, seed // 256 % 256, 0)) for seed in seeds]


def top_up(images, count, batch_size=4):
    """Paint what is missing, as a run does."""
    painter = Painter(images.size_px)
    images.folder.mkdir(exist_ok=True)
    for batch in images.lacking(count, batch_size):
        batch.keep(batch.files(painter))
    return painter


def test_missing_images_are_generated_with_a_manifest(tmp_path):
    images = ClassImages(tmp_path / "class_images", "a dog", "toy", 7, (8, 8))
    painter = top_up(images, 6)
    assert [len(seeds) for _, seeds in painter.calls] == [4, 2]
    manifest = json.loads((images.folder / "manifest.json").read_text())
    assert sorted(manifest) == sorted(path.name for path in images.folder.glob("*.png"))
    for name, facts in manifest.items():
        made = {"prompt": "a dog", "model": "toy", "resolution": 8, "sha256": file_digest(images.folder / name)}
        assert facts == made | {"seed": facts["seed"]}
    assert len({facts["seed"] for facts in manifest.values()}) == 6


def test_only_what_is_missing_is_generated_and_batches_stay_whole(tmp_path):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 8)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    (tmp_path / images.name(5)).unlink()
    painter = top_up(images, 8)
    assert [seeds for _, seeds in painter.calls] == [tuple(images.image_seed(i) for i in range(4, 8))]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    assert top_up(images, 8).calls == []
    assert len(top_up(images, 10).calls) == 1


def test_images_of_another_prompt_are_known_as_stale_and_a_persons_own_are_not(tmp_path):
    dogs, cats = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8)), ClassImages(tmp_path, "a cat", "toy", 7, (8, 8))
    top_up(dogs, 2)
    top_up(cats, 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    paths = list(tmp_path.glob("*.png"))
    assert {path.name for path in cats.stale(paths)} == {dogs.name(0), dogs.name(1)}
    assert {path.name for path in set(paths) - cats.generated(paths)} == {"mine.png"}


def test_images_of_another_size_are_stale_and_their_set_is_made_beside_them(tmp_path):
    small, large = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8)), ClassImages(tmp_path, "a dog", "toy", 7, (16, 16))
    top_up(small, 2)
    assert large.stale(list(tmp_path.glob("*.png"))) == set(tmp_path.glob("*.png"))
    assert len(top_up(large, 2).calls) == 1 and len(list(tmp_path.glob("*.png"))) == 4
    assert top_up(small, 2).calls == []


@pytest.mark.parametrize("damage", [b"", b"half a picture"])
def test_a_generated_image_that_cannot_be_read_is_made_anew(tmp_path, damage):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 2)
    whole = (tmp_path / images.name(1)).read_bytes()
    (tmp_path / images.name(1)).write_bytes(damage)
    top_up(images, 2)
    assert (tmp_path / images.name(1)).read_bytes() == whole


def test_a_generated_image_that_opens_with_other_pixels_is_drawn_again_and_said_once(tmp_path, caplog):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 4, batch_size=2)
    assert caplog.text == ""
    path = tmp_path / images.name(1)
    whole = path.read_bytes()
    Image.new("RGB", (8, 8), "grey").save(path)
    changed = path.read_bytes()
    assert len(top_up(images, 4, batch_size=2).calls) == 1 and path.read_bytes() == whole
    (record,) = caplog.records
    assert images.name(1) in record.message and images.name(0) not in record.message and "\n" not in record.message
    (kept,) = (tmp_path / "changed").iterdir()
    assert kept.read_bytes() == changed, "a person may have painted in it"
    config = TrainConfig(with_prior_preservation=True, class_prompt="a dog", num_class_images=4, resolution=8)
    taken = [photo.path.name for photo in usable_class_photos(tmp_path, config, [(images, 4)])]
    assert taken == [images.name(index) for index in range(4)]
    assert top_up(images, 4, batch_size=2).calls == []


def test_class_images_of_another_seed_and_of_a_manifest_without_digests_serve_as_they_did(tmp_path):
    top_up(ClassImages(tmp_path, "a dog", "toy", 7, (8, 8)), 2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for facts in manifest.values():
        del facts["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert top_up(ClassImages(tmp_path, "a dog", "toy", 8, (8, 8)), 2).calls == []


def test_an_image_of_another_runs_seed_is_drawn_again_with_that_seed(tmp_path):
    first = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(first, 2)
    path = tmp_path / first.name(1)
    whole = path.read_bytes()
    path.write_bytes(b"")
    top_up(ClassImages(tmp_path, "a dog", "toy", 8, (8, 8)), 2)
    assert path.read_bytes() == whole


def test_a_manifest_with_one_bit_flipped_ends_with_the_same_images(tmp_path):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    whole = (tmp_path / "manifest.json").read_bytes()
    for place in range(0, 8 * len(whole), 101):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (tmp_path / "manifest.json").write_bytes(content)
        top_up(images, 2)
        assert images.stale([tmp_path / name for name in before]) == set(), bytes(content)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    assert not (tmp_path / "changed").exists()


def test_a_manifest_that_is_a_link_to_itself_is_made_anew(tmp_path):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 2)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to("manifest.json")
    assert len(top_up(images, 2).calls) == 1 and len(images.manifest()) == 2


@pytest.mark.parametrize("text", ['{"class_', "[1, 2]", '{"a.png": 3}', "", "[" * 100_000], ids=lambda t: t[:8])
def test_a_damaged_manifest_makes_the_generated_images_stale_and_nobodys_own(tmp_path, text):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 2)
    (tmp_path / "manifest.json").write_text(text)
    paths = list(tmp_path.glob("*.png"))
    assert images.generated(paths) == images.stale(paths) == set(paths)
    assert len(top_up(images, 2).calls) == 1 and images.stale(paths) == set()


def test_too_few_usable_class_images_are_a_mistake_and_no_quiet_end_of_the_prior(tmp_path):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 2)
    config = TrainConfig(with_prior_preservation=True, class_prompt="a dog", num_class_images=3, resolution=8)
    with pytest.raises(UserError, match="only 2 of 3 class images"):
        usable_class_photos(tmp_path, config, [(images, 3)])


def test_a_persons_own_class_images_are_taken_before_generated_ones(tmp_path):
    images = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8))
    top_up(images, 3)
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"dog_{number}.png")
    config = TrainConfig(with_prior_preservation=True, class_prompt="a dog", num_class_images=3, resolution=8)
    taken = [photo.path.name for photo in usable_class_photos(tmp_path, config, [(images, 1)])]
    assert taken == ["dog_0.png", "dog_1.png", images.name(0)]


def test_a_base_that_draws_nan_ends_the_run_and_leaves_no_class_image(tmp_path):
    pipeline = tiny_sdxl(tmp_path)
    pipeline.unet.conv_out.weight.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    changes = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class")}
    with pytest.raises(UserError, match=r"pictures that are not finite .* --prior_generation_precision fp32"):
        train(tiny_config(tmp_path / "model", paint_photos(tmp_path / "photos"), tmp_path / "run", **changes))
    assert not list((tmp_path / "class").iterdir())


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    stale = tmp_path / ".manifest.json.999999999-5e526a9a.new"
    stale.touch()
    config = TrainConfig(with_prior_preservation=True, class_prompt="a dog", num_class_images=1, resolution=8)
    planned(tmp_path, config, {(8, 8): 1})
    assert not stale.exists()


@pytest.mark.slow
def test_a_class_folder_serves_two_resolutions(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "max_train_steps": 1}
    for resolution in (64, 128):
        events = []
        train(tiny_config(tiny_base, photos, tmp_path / "run", resolution=resolution, **prior), events.append)
        assert next(event for event in events if event.kind == "step").loss_prior > 0
    assert len(list((tmp_path / "class").glob("*.png"))) == 6


def test_sets_of_other_shapes_stand_beside_the_squares_and_their_manifest_says_so(tmp_path):
    square, wide = ClassImages(tmp_path, "a dog", "toy", 7, (8, 8)), ClassImages(tmp_path, "a dog", "toy", 7, (8, 16))
    top_up(square, 1)
    top_up(wide, 2)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert facts[square.name(0)]["resolution"] == 8 and facts[wide.name(1)]["resolution"] == "16x8"
    assert Image.open(tmp_path / wide.name(1)).size == (16, 8)
    assert top_up(wide, 2).calls == top_up(square, 1).calls == []
    config = TrainConfig(with_prior_preservation=True, class_prompt="a dog", num_class_images=3, resolution=8)
    taken = [photo.path.name for photo in usable_class_photos(tmp_path, config, [(square, 1), (wide, 2)])]
    assert taken == [square.name(0), wide.name(0), wide.name(1)]


@pytest.mark.parametrize(
    ("counts", "total", "shared"),
    [((5,), 7, (7,)), ((3, 1), 8, (6, 2)), ((98, 1, 1), 10, (8, 1, 1)), ((2, 2, 1), 1, (1, 0, 0)), ((1, 2), 0, (0, 0))],
)
def test_class_images_are_shared_by_the_photos_of_each_size_and_each_size_gets_one(counts, total, shared):
    sizes = {(8, 8 * number): count for number, count in enumerate(counts, start=1)}
    assert tuple(shares(sizes, total).values()) == shared
