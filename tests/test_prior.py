"""Class images: topped up, with a manifest, and never those of another prompt."""

import json

from PIL import Image

from dreambooth_moslora.prior import ClassImages


class Painter:
    """Stands where the base generates: pictures that tell their seed."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, seeds):
        self.calls.append((prompt, tuple(seeds)))
        return [Image.new("RGB", (8, 8), (seed % 256, seed // 256 % 256, 0)) for seed in seeds]


def top_up(images, count, batch_size=4):
    painter = Painter()
    counts = list(images.top_up(count, batch_size, painter))
    return painter, counts


def test_missing_images_are_generated_with_a_manifest(tmp_path):
    images = ClassImages(tmp_path / "class_images", "a dog", "toy", 7)
    painter, counts = top_up(images, 6)
    assert counts == [4, 6] and [len(seeds) for _, seeds in painter.calls] == [4, 2]
    manifest = json.loads((images.folder / "manifest.json").read_text())
    assert sorted(manifest) == sorted(path.name for path in images.folder.glob("*.png"))
    assert all(facts == {"prompt": "a dog", "model": "toy", "seed": facts["seed"]} for facts in manifest.values())
    assert len({facts["seed"] for facts in manifest.values()}) == 6


def test_only_what_is_missing_is_generated_and_batches_stay_whole(tmp_path):
    images = ClassImages(tmp_path, "a dog", "toy", 7)
    top_up(images, 8)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    (tmp_path / images.name(5)).unlink()
    painter, _ = top_up(images, 8)
    assert [seeds for _, seeds in painter.calls] == [tuple(images.image_seed(i) for i in range(4, 8))]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    assert top_up(images, 8)[0].calls == []
    assert len(top_up(images, 10)[0].calls) == 1


def test_images_of_another_prompt_are_known_as_stale_and_a_persons_own_are_not(tmp_path):
    dogs, cats = ClassImages(tmp_path, "a dog", "toy", 7), ClassImages(tmp_path, "a cat", "toy", 7)
    top_up(dogs, 2)
    top_up(cats, 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    stale = {path.name for path in tmp_path.glob("*.png") if cats.is_stale(path)}
    assert stale == {dogs.name(0), dogs.name(1)}
    assert [path.name for path in tmp_path.glob("*.png") if not cats.is_ours(path)] == ["mine.png"]
