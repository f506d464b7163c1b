"""Captions made for photos: where they are written, that what a person wrote stays, and the models
that say them."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from dreambooth_moslora.disk.paths import find_asset, get_assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import captions
from dreambooth_moslora.photos.folder import build_photo_report, find_photos
from dreambooth_moslora.photos.photo_file import open_image
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.odd_photos import picture
from tests.helpers.tiny_encoders import save_tiny_chat_model
from tests.photos.test_masks import config_of
from toybox.make_subjects import PHOTO_PLACES

PROMPT = "a photo of a sks dog"


def captioner(words: str = "on grass", asked: list | None = None) -> captions.Captioner:
    """Says the same of every picture, and counts."""
    return captions.Captioner(
        "same", "dog", lambda image: (asked is not None and asked.append(image.size)) or words
    )


def photos_in(folder: Path):
    return find_photos(folder, PROMPT, 64).photos


def written(folder: Path, words: str = "on grass") -> list[str | None]:
    made = captions.write_caption_files(photos_in(folder), captioner(words), PROMPT)
    return [one.caption for one in made]


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


def test_captions_go_beside_photos_that_have_none_and_a_persons_own_stay(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert written(folder) == [f"{PROMPT} on grass", None, None, None, None]
    assert written(folder, "in the snow") == [None] * 5
    assert all(path.read_bytes() == content for path, content in before.items())
    assert photos_in(folder)[0].captions == (f"{PROMPT} on grass",)


def test_photos_that_would_share_a_caption_get_none(tmp_path):
    """A silent model leaves a photo as it is."""
    for name in ("a.jpg", "a.png", "b.jpg"):
        picture().save(tmp_path / name)
    assert written(tmp_path, "") == [None] * 3
    made = list(captions.write_caption_files(photos_in(tmp_path), captioner(), PROMPT))
    assert [found.caption is None for found in made] == [True, True, False]
    assert "rename one of them" in made[0].remark
    texts = [
        path.name
        for path in tmp_path.iterdir()
        if path.suffix == ".txt" and not path.name.startswith(".")
    ]
    assert texts == ["b.txt"]


def test_kept_captions_are_made_once_for_each_photo_model_and_words(folder, tmp_path):
    """A run sees them in place of the prompt, with prefix and suffix."""
    run, kept = tmp_path / "run", tmp_path / "run" / "captions.json"

    def asked(prompt: str = PROMPT) -> int:
        """Captions kept for photos without one; how many were asked for."""
        asked = []
        for photo in photos_in(folder):
            if not photo.is_captioned:
                captions.save_caption(
                    kept,
                    captions.make_run_caption(photo, captioner(asked=asked), prompt, kept),
                    prompt,
                )
        return len(asked)

    assert [asked(prompt) for prompt in (PROMPT, PROMPT, "a sks cat")] == [2, 0, 2]
    kept.write_text("{broken")
    assert asked() == 2
    settings = {
        "instance_data_dir": str(folder),
        "output_dir": str(run),
        "instance_prompt": PROMPT,
        "resolution": 64,
    }
    auto = build_photo_report(
        TrainConfig(**settings, captions="auto", caption_prefix="sharp,")
    ).photos
    made, own = f"sharp, {PROMPT} on grass", ["sharp, my own words", PROMPT]
    assert [photo.captions[0] for photo in auto] == [made, *own, made, "sharp, mine"]
    assert build_photo_report(TrainConfig(**settings)).photos[0].captions == (PROMPT,)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("chat"))


def test_a_language_model_answers_the_same_to_the_same_photo_and_sees_photo_and_word(chat_model):
    dog = captions.load_captioner(config_of(caption_model=str(chat_model)))
    cat = captions.load_captioner(
        config_of(caption_model=str(chat_model), instance_prompt="a photo of sks cat")
    )
    said = dog.surroundings(picture())
    assert said and said == dog.surroundings(picture()) and dog.name == "chat" and dog.word == "dog"
    assert said != dog.surroundings(picture().rotate(90)) and said != cat.surroundings(picture())
    assert all(letter.isprintable() for letter in said)


def test_the_model_goes_on_from_the_words_for_the_subject(chat_model):
    asked = captions.build_conversation(picture(size_px=(3000, 2000)), "dog", "Where?")
    assert asked[0]["content"][0]["image"].size == (512, 768)
    words = AutoProcessor.from_pretrained(chat_model).apply_chat_template(
        asked, continue_final_message=True
    )
    assert words.endswith("assistant\nA photo of a dog") and "sks" not in words


ANSWERS = {
    " lying on a beach at sunset, seen from above.\nIt is brown.": "lying on a beach at sunset, "
    "seen from above",
    ", in a kitchen. The dog is small": "in a kitchen",
    ' "on 3.5 m of grass"': "on 3.5 m of grass",
    "\x1b[31m on\x00 snow": "[31m on snow",
    " . ": "",
    "": "",
    "on " * 50: " ".join(["on"] * 30),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_becomes_one_phrase(answer):
    assert captions.parse_surroundings(answer) == ANSWERS[answer]


def test_an_absent_model_and_a_foreign_one_are_one_line(chat_model, tmp_path):
    foreign, silent = tmp_path / "foreign", tmp_path / "silent"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    shutil.copytree(chat_model, silent)
    (silent / "chat_template.jinja").unlink()
    for settings, said in (
        ({}, "--caption_model Qwen/Qwen3-VL-2B-Instruct is not here and cannot be fetched"),
        ({"caption_model": str(foreign)}, "--caption_model"),
        ({"caption_model": str(silent)}, "has no chat template"),
        ({"instance_prompt": "sks"}, "no word says what the photos show"),
    ):
        with pytest.raises(UserError, match=said):
            captions.load_captioner(config_of(**settings)).surroundings(picture())
    assert (
        captions.load_captioner(
            config_of(pretrained_model_name_or_path="toy", instance_prompt="sks")
        ).word
        == "toy"
    )


def test_the_embedded_bases_clip_reads_where_the_sample_subjects_stand():
    """Five photos, each at the place of its number; none of them was trained on."""
    duck = {"pretrained_model_name_or_path": "toy", "instance_prompt": "a photo of a sks duck"}
    captioner, right = captions.load_captioner(config_of(**duck)), 0
    for number, place in enumerate(PHOTO_PLACES):
        photo = open_image(Path(find_asset(f"assets/subjects/duck/{number:02d}.jpg")))
        right += captioner.surroundings(photo).startswith(place)
    assert right >= 4 and (get_assets_folder() / captioner.name).is_dir()


@pytest.mark.parametrize(
    ("base", "folder", "is_warned"),
    [("toy", "", True), ("toy", "assets/subjects/duck", False), ("other", "", False)],
)
def test_where_the_toys_captioner_sees_what_is_no_toy_it_is_said_to_invent(
    base, folder, is_warned, tmp_path, caplog
):
    """Noise was called “in the snow in the fog”."""
    folder = find_asset(folder) if folder else tmp_path
    toys = {"pretrained_model_name_or_path": base, "instance_data_dir": str(folder)}
    captions.load_captioner(config_of(**toys, instance_prompt="a photo of a sks dog"))
    assert [captions.TOY_CAPTIONER_WARNING] * is_warned == caplog.messages
