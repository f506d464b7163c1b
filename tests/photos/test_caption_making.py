"""Captions made for photos: where they are written, and that what a person wrote is never touched."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dreambooth_moslora.photos.captions import Captioner, keep, make_beside, make_for_run
from dreambooth_moslora.photos.folder import find_photos, photo_report
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.odd_photos import picture

PROMPT = "a photo of a sks dog"


def captioner(words: str = "on grass", asked: list | None = None) -> Captioner:
    """Says the same of every picture, and counts."""

    def surroundings(image: Image.Image) -> str:
        if asked is not None:
            asked.append(image.size)
        return words

    return Captioner("same", "dog", surroundings)


def photos_in(folder: Path):
    return find_photos(folder, PROMPT, 64).photos


def keep_all(photos: list, captioner: Captioner, prompt: str, path: Path) -> None:
    for photo in photos:
        keep(path, make_for_run(photo, captioner, prompt, path), prompt)


def written(folder: Path, words: str = "on grass", **options) -> list[str | None]:
    return [made.caption for made in make_beside(photos_in(folder), captioner(words), PROMPT, **options)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """a has no caption, b and c have a person's, d an empty file, e a line in metadata.jsonl."""
    for name in "abcde":
        picture().save(tmp_path / f"{name}.jpg")
    (tmp_path / "b.txt").write_text("my own words")
    (tmp_path / "c.txt").write_text(PROMPT)
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "e.jpg", "text": "mine"}))
    return tmp_path


@pytest.mark.parametrize("anew", [False, True])
def test_captions_go_beside_photos_that_have_none_and_a_persons_own_stay(folder, anew):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert written(folder, anew=anew) == [f"{PROMPT} on grass", None, None, None, None]
    assert written(folder, "in the snow", anew=anew) == [f"{PROMPT} in the snow" if anew else None, *[None] * 4]
    assert all(path.read_bytes() == content for path, content in before.items())
    made = f"{PROMPT} in the snow" if anew else f"{PROMPT} on grass"
    assert photos_in(folder)[0].captions == (made,)
    assert not any(item.path.name.startswith(".made") for item in find_photos(folder, PROMPT, 64).skipped)


def test_a_made_caption_that_a_person_changed_is_the_persons(folder):
    written(folder)
    (folder / "a.txt").write_text("a photo of a sks dog on grass, seen from behind")
    assert written(folder, "in the snow", anew=True)[0] is None
    assert (folder / "a.txt").read_text().endswith("seen from behind")


def test_photos_that_would_share_a_caption_get_none(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        picture().save(tmp_path / name)
    made = list(make_beside(photos_in(tmp_path), captioner(), PROMPT))
    assert [found.caption is None for found in made] == [True, True, False]
    assert "rename one of them" in made[0].remark


def test_a_silent_model_leaves_the_photo_as_it_is(tmp_path):
    picture().save(tmp_path / "a.jpg")
    assert written(tmp_path, "") == [None] and [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_kept_captions_are_made_once_for_each_photo_model_and_words(folder, tmp_path):
    kept, asked = tmp_path / "run" / "captions.json", []
    bare = [photo for photo in photos_in(folder) if not photo.is_captioned]

    def ask(prompt: str = PROMPT) -> int:
        asked.clear()
        keep_all(bare, captioner(asked=asked), prompt, kept)
        return len(asked)

    assert [ask(), ask(), ask("a sks cat")] == [2, 0, 2]
    kept.write_text("{broken")
    assert ask() == 2


def test_a_run_sees_kept_captions_in_place_of_the_prompt_with_prefix_and_suffix(folder, tmp_path):
    run = tmp_path / "run"
    settings = {"instance_data_dir": str(folder), "output_dir": str(run), "instance_prompt": PROMPT, "resolution": 64}
    bare = [photo for photo in photos_in(folder) if not photo.is_captioned]
    keep_all(bare, captioner(), PROMPT, run / "captions.json")
    auto = photo_report(TrainConfig(**settings, captions="auto", caption_suffix=", sharp")).photos
    assert [photo.captions[0] for photo in auto] == [
        f"{PROMPT} on grass, sharp",
        "my own words, sharp",
        PROMPT,
        f"{PROMPT} on grass, sharp",
        "mine, sharp",
    ]
    assert photo_report(TrainConfig(**settings)).photos[0].captions == (PROMPT,)


def test_a_photo_whose_name_leaves_no_room_for_a_captions_costs_the_others_nothing(tmp_path):
    """255 bytes, the most there are: a temporary's name beside it would be longer."""
    for name in ("a" * 251, "b"):
        picture().save(tmp_path / f"{name}.jpg")
    made = list(make_beside(photos_in(tmp_path), captioner(), PROMPT))
    assert "too long" in made[0].remark and (tmp_path / "b.txt").read_text() == "a photo of a sks dog on grass\n"
    assert not list(tmp_path.glob("aaa*.txt"))
