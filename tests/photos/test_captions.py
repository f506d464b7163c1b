"""Captions of photos without one: where they are written, and the models that make them."""

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
from tests.photos.test_masks import build_config
from toybox.make_subjects import PHOTO_PLACES

PROMPT = "a photo of a sks dog"


def build_captioner(
    surroundings: str = "on grass", requests: list | None = None
) -> captions.Captioner:
    """Return a captioner that says the same of every photo and records its calls."""
    return captions.Captioner(
        "same",
        "dog",
        lambda image: (requests is not None and requests.append(image.size)) or surroundings,
    )


def list_photos(folder: Path):
    return find_photos(folder, PROMPT, 64).photos


def write_captions(folder: Path, surroundings: str = "on grass") -> list[str | None]:
    generated = captions.write_caption_files(
        list_photos(folder), build_captioner(surroundings), PROMPT
    )
    return [result.caption for result in generated]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return photos: a has no caption, b and c a text file, d an empty one, e a metadata line."""
    for name in "abcde":
        picture().save(tmp_path / f"{name}.jpg")
    (tmp_path / "b.txt").write_text("my own words")
    (tmp_path / "c.txt").write_text(PROMPT)
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "e.jpg", "text": "mine"}))
    return tmp_path


def test_only_photos_without_a_caption_get_one_beside_them(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert write_captions(folder) == [f"{PROMPT} on grass", None, None, None, None]
    assert write_captions(folder, "in the snow") == [None] * 5
    assert all(path.read_bytes() == content for path, content in before.items())
    assert list_photos(folder)[0].captions == (f"{PROMPT} on grass",)


def test_photos_that_would_share_a_caption_get_none(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        picture().save(tmp_path / name)
    assert write_captions(tmp_path, "") == [None] * 3
    generated = list(captions.write_caption_files(list_photos(tmp_path), build_captioner(), PROMPT))
    assert [result.caption is None for result in generated] == [True, True, False]
    assert "rename one of them" in generated[0].remark
    texts = [
        path.name
        for path in tmp_path.iterdir()
        if path.suffix == ".txt" and not path.name.startswith(".")
    ]
    assert texts == ["b.txt"]


def test_saved_caption_is_reused_for_photo_model_and_prompt(folder, tmp_path):
    run, captions_file = tmp_path / "run", tmp_path / "run" / "captions.json"

    def requests(prompt: str = PROMPT) -> int:
        """Save captions of photos without one; return how many the model made."""
        requests = []
        for photo in list_photos(folder):
            if not photo.is_captioned:
                captions.save_caption(
                    captions_file,
                    captions.make_run_caption(
                        photo, build_captioner(requests=requests), prompt, captions_file
                    ),
                    prompt,
                )
        return len(requests)

    assert [requests(prompt) for prompt in (PROMPT, PROMPT, "a sks cat")] == [2, 0, 2]
    captions_file.write_text("{broken")
    assert requests() == 2
    settings = {
        "instance_data_dir": str(folder),
        "output_dir": str(run),
        "instance_prompt": PROMPT,
        "resolution": 64,
    }
    auto = build_photo_report(
        TrainConfig(**settings, captions="auto", caption_prefix="sharp,")
    ).photos
    generated, handwritten = f"sharp, {PROMPT} on grass", ["sharp, my own words", PROMPT]
    assert [photo.captions[0] for photo in auto] == [
        generated,
        *handwritten,
        generated,
        "sharp, mine",
    ]
    assert build_photo_report(TrainConfig(**settings)).photos[0].captions == (PROMPT,)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("chat"))


def test_a_chat_model_sees_photo_and_word_and_is_deterministic(chat_model):
    dog = captions.load_captioner(build_config(caption_model=str(chat_model)))
    cat = captions.load_captioner(
        build_config(caption_model=str(chat_model), instance_prompt="a photo of sks cat")
    )
    answer = dog.surroundings(picture())
    assert (
        answer
        and answer == dog.surroundings(picture())
        and dog.name == "chat"
        and dog.word == "dog"
    )
    assert answer != dog.surroundings(picture().rotate(90)) and answer != cat.surroundings(
        picture()
    )
    assert all(letter.isprintable() for letter in answer)


def test_the_chat_ends_in_the_beginning_of_the_answer(chat_model):
    requests = captions.build_conversation(picture(size_px=(3000, 2000)), "dog", "Where?")
    assert requests[0]["content"][0]["image"].size == (512, 768)
    surroundings = AutoProcessor.from_pretrained(chat_model).apply_chat_template(
        requests, continue_final_message=True
    )
    assert surroundings.endswith("assistant\nA photo of a dog") and "sks" not in surroundings


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


def test_an_unusable_caption_model_is_refused_in_one_line(chat_model, tmp_path):
    foreign, silent = tmp_path / "foreign", tmp_path / "silent"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    shutil.copytree(chat_model, silent)
    (silent / "chat_template.jinja").unlink()
    for settings, answer in (
        ({}, "--caption_model Qwen/Qwen3-VL-2B-Instruct is not here and cannot be fetched"),
        ({"caption_model": str(foreign)}, "--caption_model"),
        ({"caption_model": str(silent)}, "has no chat template"),
        ({"instance_prompt": "sks"}, "no word says what the photos show"),
    ):
        with pytest.raises(UserError, match=answer):
            captions.load_captioner(build_config(**settings)).surroundings(picture())
    assert (
        captions.load_captioner(
            build_config(pretrained_model_name_or_path="toy", instance_prompt="sks")
        ).word
        == "toy"
    )


def test_the_toy_captioner_reads_the_place_of_sample_photos():
    duck = {"pretrained_model_name_or_path": "toy", "instance_prompt": "a photo of a sks duck"}
    build_captioner, right = captions.load_captioner(build_config(**duck)), 0
    for number, place in enumerate(PHOTO_PLACES):
        photo = open_image(Path(find_asset(f"assets/subjects/duck/{number:02d}.jpg")))
        right += build_captioner.surroundings(photo).startswith(place)
    assert right >= 4 and (get_assets_folder() / build_captioner.name).is_dir()


@pytest.mark.parametrize(
    ("base", "folder", "is_warned"),
    [("toy", "", True), ("toy", "assets/subjects/duck", False), ("other", "", False)],
)
def test_the_toy_captioner_warns_of_photos_without_toys(base, folder, is_warned, tmp_path, caplog):
    folder = find_asset(folder) if folder else tmp_path
    toys = {"pretrained_model_name_or_path": base, "instance_data_dir": str(folder)}
    captions.load_captioner(build_config(**toys, instance_prompt="a photo of a sks dog"))
    assert [captions.TOY_CAPTIONER_WARNING] * is_warned == caplog.messages
