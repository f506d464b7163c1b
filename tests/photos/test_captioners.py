"""The models that say what surrounds a subject: a random Qwen3-VL as a folder, and the embedded base's own CLIP."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, PreTrainedModel

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import assets_folder, find_asset
from dreambooth_moslora.photos.captions import conversation, load_captioner, surroundings_in
from dreambooth_moslora.photos.photo import open_image
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.odd_photos import picture
from tests.helpers.tiny_chat_model import save_tiny_chat_model
from toybox.make_subjects import PHOTO_PLACES

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("chat"))


def config_of(**settings) -> TrainConfig:
    return TrainConfig(**{"pretrained_model_name_or_path": SDXL, "instance_prompt": "a photo of sks dog", **settings})


def test_a_language_model_answers_the_same_to_the_same_photo_and_sees_photo_and_word(chat_model):
    dog = load_captioner(config_of(caption_model=str(chat_model)))
    cat = load_captioner(config_of(caption_model=str(chat_model), instance_prompt="a photo of sks cat"))
    said = dog.surroundings(picture())
    assert said and said == dog.surroundings(picture()) and dog.name == "chat" and dog.word == "dog"
    assert said != dog.surroundings(picture().rotate(90)) and said != cat.surroundings(picture())
    assert all(letter.isprintable() for letter in said)


def test_the_model_goes_on_from_the_words_for_the_subject(chat_model):
    asked = conversation(picture(size_px=(3000, 2000)), "dog")
    assert asked[0]["content"][0]["image"].size == (512, 768)
    words = AutoProcessor.from_pretrained(chat_model).apply_chat_template(asked, continue_final_message=True)
    assert words.endswith("assistant\nA photo of a dog") and "sks" not in words


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16)])
def test_on_a_gpu_the_model_is_loaded_in_the_half_precision_that_the_gpu_has(major, dtype, chat_model, monkeypatch):
    """It is loaded on the CPU, and only its last move would need the GPU."""
    moved = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (major, 0))
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: moved.append((model.dtype, device)) or model)
    said = load_captioner(config_of(caption_model=str(chat_model)), "cuda").surroundings(picture())
    assert moved == [(dtype, "cuda")] and all(letter.isprintable() for letter in said)


@pytest.mark.parametrize(
    ("answer", "surroundings"),
    [
        (" lying on a beach at sunset, seen from above.\nIt is brown.", "lying on a beach at sunset, seen from above"),
        (", in a kitchen. The dog is small", "in a kitchen"),
        (' "on 3.5 m of grass"', "on 3.5 m of grass"),
        ("\x1b[31m on\x00 snow", "[31m on snow"),
        (" . ", ""),
        ("", ""),
        ("on " * 50, " ".join(["on"] * 30)),
    ],
)
def test_an_answer_becomes_one_phrase(answer, surroundings):
    assert surroundings_in(answer) == surroundings


def test_an_absent_model_and_a_foreign_one_are_one_line(chat_model, tmp_path):
    with pytest.raises(UserError, match="--caption_model Qwen/Qwen3-VL-2B-Instruct is not here and cannot be fetched"):
        load_captioner(config_of()).surroundings(picture())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--caption_model"):
        load_captioner(config_of(caption_model=str(tmp_path))).surroundings(picture())
    shutil.copytree(chat_model, tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_captioner(config_of(caption_model=str(tmp_path / "silent"))).surroundings(picture())


def test_without_a_word_for_the_subject_there_is_nothing_to_go_on_from():
    with pytest.raises(UserError, match="no word says what the photos show"):
        load_captioner(config_of(instance_prompt="sks"))
    assert load_captioner(config_of(pretrained_model_name_or_path="toy", instance_prompt="sks")).word == "toy"


def test_the_embedded_bases_clip_reads_where_the_sample_subjects_stand():
    """Five photos, each at the place of its number; none of them was trained on."""
    duck = {"pretrained_model_name_or_path": "toy", "instance_prompt": "a photo of a sks duck"}
    captioner, right = load_captioner(config_of(**duck)), 0
    for number, place in enumerate(PHOTO_PLACES):
        photo = open_image(Path(find_asset(f"assets/subjects/duck/{number:02d}.jpg")))
        right += captioner.surroundings(photo).startswith(place)
    assert right >= 4 and (assets_folder() / captioner.name).is_dir()
