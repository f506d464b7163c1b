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
from tests.helpers.tiny_training import tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


class Painter:
    """Stands where the base generates: pictures (h, w) that tell their seed."""

    def __init__(self, size_px):
        self.calls, self.size_px = [], size_px

    def __call__(self, prompt, seeds):
        self.calls.append((prompt, tuple(seeds)))
        return [Image.new("RGB", self.size_px[::-1], (seed % 256, seed // 256 % 256, 0)) for seed in seeds]


def dogs(folder, seed=7, size=(8, 8)):
    return ClassImages(folder, "a dog", "toy", seed, size)


def wanted(count):
    return TrainConfig(with_prior_preservation=True, class_prompt="a dog", num_class_images=count, resolution=8)


def taken(folder, *sets):
    """The names of the pictures that are taken of these sets, with so many of each."""
    count = sum(number for _, number in sets)
    return [photo.path.name for photo in usable_class_photos(folder, wanted(max(count, 3)), list(sets))]


def pictures_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def top_up(images, count, batch_size=4):
    """Paint what is missing, as a run does."""
    painter = Painter(images.size_px)
    images.folder.mkdir(exist_ok=True)
    for batch in images.lacking(count, batch_size):
        batch.keep(batch.files(painter))
    return painter


def test_missing_images_are_generated_with_a_manifest(tmp_path):
    images = dogs(tmp_path / "class_images")
    painter = top_up(images, 6)
    assert [len(seeds) for _, seeds in painter.calls] == [4, 2]
    manifest = json.loads((images.folder / "manifest.json").read_text())
    assert manifest.keys() == pictures_in(images.folder).keys()
    for name, facts in manifest.items():
        made = {"prompt": "a dog", "model": "toy", "resolution": 8, "sha256": file_digest(images.folder / name)}
        assert facts == made | {"seed": facts["seed"]}
    assert len({facts["seed"] for facts in manifest.values()}) == 6


@pytest.mark.parametrize("damage", [None, b"", b"half a picture"])
def test_only_what_is_missing_or_cannot_be_read_is_generated_and_batches_stay_whole(damage, tmp_path):
    images = dogs(tmp_path)
    top_up(images, 8)
    before, path = pictures_in(tmp_path), tmp_path / images.name(5)
    path.unlink() if damage is None else path.write_bytes(damage)
    painter = top_up(dogs(tmp_path, seed=8) if damage == b"" else images, 8)  # each has its own seed noted
    assert [seeds for _, seeds in painter.calls] == [tuple(images.image_seed(i) for i in range(4, 8))]
    assert pictures_in(tmp_path) == before
    assert top_up(images, 8).calls == [] and len(top_up(images, 10).calls) == 1


def test_images_of_another_prompt_are_known_as_stale_and_a_persons_own_are_not(tmp_path):
    own, cats = dogs(tmp_path), ClassImages(tmp_path, "a cat", "toy", 7, (8, 8))
    top_up(own, 2)
    top_up(cats, 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    paths = list(tmp_path.glob("*.png"))
    assert {path.name for path in cats.stale(paths)} == {own.name(0), own.name(1)}
    assert {path.name for path in set(paths) - cats.generated(paths)} == {"mine.png"}


def test_sets_of_other_sizes_are_stale_stand_beside_the_first_and_their_manifest_says_so(tmp_path):
    square, wide = dogs(tmp_path), dogs(tmp_path, size=(8, 16))
    top_up(square, 1)
    assert wide.stale(list(tmp_path.glob("*.png"))) == set(tmp_path.glob("*.png")) != set()
    top_up(wide, 2)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert facts[square.name(0)]["resolution"] == 8 and facts[wide.name(1)]["resolution"] == "16x8"
    assert Image.open(tmp_path / wide.name(1)).size == (16, 8)
    assert top_up(wide, 2).calls == top_up(square, 1).calls == []
    assert taken(tmp_path, (square, 1), (wide, 2)) == [square.name(0), wide.name(0), wide.name(1)]


def test_a_generated_image_that_opens_with_other_pixels_is_drawn_again_and_said_once(tmp_path, caplog):
    images = dogs(tmp_path)
    top_up(images, 4, batch_size=2)
    assert caplog.text == ""
    path = tmp_path / images.name(1)
    whole = path.read_bytes()
    Image.new("RGB", (8, 8), "grey").save(path)
    changed = path.read_bytes()
    assert len(top_up(images, 4, batch_size=2).calls) == 1 and path.read_bytes() == whole
    (said,) = caplog.messages
    assert images.name(1) in said and images.name(0) not in said and "\n" not in said
    (kept,) = (tmp_path / "changed").iterdir()
    assert kept.read_bytes() == changed, "a person may have painted in it"
    assert taken(tmp_path, (images, 4)) == [images.name(index) for index in range(4)]
    assert top_up(images, 4, batch_size=2).calls == []


def test_class_images_of_another_seed_and_of_a_manifest_without_digests_serve_as_they_did(tmp_path):
    top_up(dogs(tmp_path), 2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for facts in manifest.values():
        del facts["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert top_up(dogs(tmp_path, seed=8), 2).calls == []


def test_a_manifest_with_one_bit_flipped_ends_with_the_same_images(tmp_path):
    images = dogs(tmp_path)
    top_up(images, 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    before, whole = pictures_in(tmp_path), (tmp_path / "manifest.json").read_bytes()
    for place in range(0, 8 * len(whole), 101):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        (tmp_path / "manifest.json").write_bytes(content)
        top_up(images, 2)
        assert images.stale([tmp_path / name for name in before]) == set(), bytes(content)
    assert pictures_in(tmp_path) == before and not (tmp_path / "changed").exists()


DAMAGES = ['{"class_', "[1, 2]", '{"a.png": 3}', "", "[" * 100_000, None]


@pytest.mark.parametrize("text", DAMAGES, ids=lambda text: text[:8] if text else str(text))
def test_a_damaged_manifest_makes_the_generated_images_stale_and_nobodys_own(tmp_path, text):
    images, manifest = dogs(tmp_path), tmp_path / "manifest.json"
    top_up(images, 2)
    if text is None:
        manifest.unlink()
        manifest.symlink_to(manifest.name)
    else:
        manifest.write_text(text)
    paths = list(tmp_path.glob("*.png"))
    assert images.generated(paths) == images.stale(paths) == set(paths)
    assert len(top_up(images, 2).calls) == 1 and images.stale(paths) == set() and len(images.manifest()) == 2


def test_a_persons_own_class_images_are_taken_first_and_too_few_are_a_mistake(tmp_path):
    images = dogs(tmp_path)
    top_up(images, 2)
    with pytest.raises(UserError, match="only 2 of 3 class images"):
        taken(tmp_path, (images, 3))
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"dog_{number}.png")
    assert taken(tmp_path, (images, 1)) == ["dog_0.png", "dog_1.png", images.name(0)]


def test_a_base_that_draws_nan_ends_the_run_and_leaves_no_class_image(photos, tmp_path):
    pipeline = tiny_sdxl(tmp_path)
    pipeline.unet.conv_out.weight.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    changes = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class")}
    with pytest.raises(UserError, match=r"pictures that are not finite .* --prior_generation_precision fp32"):
        train(tiny_config(tmp_path / "model", photos, tmp_path / "run", **changes))
    assert not list((tmp_path / "class").iterdir())


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    stale = tmp_path / ".manifest.json.999999999-5e526a9a.new"
    stale.touch()
    planned(tmp_path, wanted(1), {(8, 8): 1})
    assert not stale.exists()


@pytest.mark.parametrize(
    ("counts", "total", "shared"),
    [((5,), 7, (7,)), ((3, 1), 8, (6, 2)), ((98, 1, 1), 10, (8, 1, 1)), ((2, 2, 1), 1, (1, 0, 0)), ((1, 2), 0, (0, 0))],
)
def test_class_images_are_shared_by_the_photos_of_each_size_and_each_size_gets_one(counts, total, shared):
    sizes = {(8, 8 * number): count for number, count in enumerate(counts, start=1)}
    assert tuple(shares(sizes, total).values()) == shared
