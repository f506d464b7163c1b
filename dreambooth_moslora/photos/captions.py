"""Captions made for photos that have none: the models that describe, and the files they leave.

A model describes the surroundings of the subject, but not the subject: for photographs Qwen3-VL 2B
(Apache 2.0), or another with a chat template, which continues the text "A photo of a dog"; the
embedded base reads place and light by its own CLIP. torch is imported only to load a model. What
the user wrote is never changed. The made captions lie

beside the photos    `dog.txt`, as a user would write it (the command `caption`)
in a run folder      `captions.json` (`--captions auto`), so that a resumed run does not make it
                     again:
                     {"dog.jpg": {"caption": "a photo of a sks dog on the beach", "made_from": key}}
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import SUBJECT_FILE, get_public_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import photo_file, sidecars
from dreambooth_moslora.photos.pretrained import load_frozen, load_pretrained
from dreambooth_moslora.precision import choose_half_precision
from dreambooth_moslora.settings import prompts, subject_kinds, toy_bases, train_config

logger = logging.getLogger(__name__)

# The chat model by default
DEFAULT_CAPTION_MODEL = "Qwen/Qwen3-VL-2B-Instruct"
# What it is asked, what of the looks, and the beginning of its answer, which it continues
SUBJECT_QUESTION = (
    "Write the end of a caption: in at most twenty words, where the {word} is, what is around "
    "it, the light and the side from which it is seen. {looks}"
)
STYLE_QUESTION = (
    "Write the end of a caption: in at most twenty words, what the picture shows, where it is and "
    "what is around it. Say nothing about how it is drawn or photographed, its colours or style."
)
STYLE_ANSWER_START = "A picture that shows"
NO_LOOKS_INSTRUCTION = "Say nothing about how the {word} itself looks."
ANSWER_START = "A photo of a {word}"
# The photo's longer side as the model sees it: more pixels cost time and change few words
MAX_INPUT_PX = 768
# What is said where the embedded base's own captioner sees other photos
TOY_CAPTIONER_WARNING = (
    "captions: the toy knows its own world alone, and invents where other things are: write them "
    "yourself, or train a larger base"
)
# Bounds of an answer: SDXL reads 77 tokens
MAX_ANSWER_TOKENS = 60
MAX_ANSWER_WORDS = 30


@dataclass(frozen=True)
class Captioner:
    name: str  # the model's public name
    word: str  # what the photos show, and the traits that were asked for or left out
    surroundings: Callable[[Image.Image], str]  # of an RGB picture: "on the beach at sunset", or ""


def load_captioner(config: train_config.TrainConfig, device: Any = "cpu") -> Captioner:
    """The captioner of `--caption_model`, by default the embedded base's own CLIP or Qwen3-VL,
    loaded onto the torch device at the first caption. Raises UserError without a class word, and
    later for a missing model."""
    own = toy_bases.CLIP_FOLDER.name
    default = (
        own if toy_bases.is_toy(config.pretrained_model_name_or_path) else DEFAULT_CAPTION_MODEL
    )
    name = os.path.expanduser(config.caption_model or default)

    # The word is what the model must not describe.
    kind = subject_kinds.get_subject_kind(config.each_subject[0])
    word = prompts.get_class_word(config) or ("toy" if name == own else "")
    word = "picture" if kind.is_style and not word else word
    if not word:
        raise UserError(
            "captions: no word says what the photos show; "
            'name it behind the rare word, as in "sks dog".'
        )

    # Photos of toys have their facts beside them.
    folder = config.each_subject[0].instance_data_dir
    if name == own and folder and not (Path(folder) / SUBJECT_FILE).is_file():
        logger.warning(TOY_CAPTIONER_WARNING)

    # A vision-language model has gigabytes. Loading waits until a photo needs a caption.
    @cache
    def reader() -> Callable[[Image.Image], str]:
        if name == own:
            return load_toy_captioner(word, device)
        return load_chat_captioner(name, word, device, build_question(config, word))

    # Captions that say other traits are made again.
    left_out = (f"no {trait}" for trait in subject_kinds.list_omitted_traits(config))
    asked = " ".join((word, *config.describe, *left_out))
    return Captioner(get_public_name(name), asked, lambda image: reader()(image))


def build_question(config: train_config.TrainConfig, word: str) -> str:
    """What the model is asked: the surroundings, and of the looks what `--describe` names."""
    if subject_kinds.get_subject_kind(config).is_style:
        return STYLE_QUESTION
    looks = NO_LOOKS_INSTRUCTION.format(word=word)
    if config.describe:
        looks = f"Say too how the {word}'s {' and '.join(config.describe)} look, and nothing else"
        looks += f" about the {word}."
    left_out = subject_kinds.list_omitted_traits(config)
    if left_out:
        looks += f" Do not mention {', '.join(left_out)} or the face."
    return SUBJECT_QUESTION.format(word=word, looks=looks)


def load_toy_captioner(word: str, device: Any) -> Callable[[Image.Image], str]:
    """A captioner by the CLIP of the embedded base."""
    from dreambooth_moslora.photos.toy_readers import SurroundingsReader, format_surroundings

    clip = SurroundingsReader(toy_bases.CLIP_FOLDER, device)

    def read(image: Image.Image) -> str:
        place, light = clip.read(image, word)
        return format_surroundings(place, light)

    return read


def load_chat_captioner(
    name: str, word: str, device: Any, question: str
) -> Callable[[Image.Image], str]:
    """A captioner by a chat model, decoded greedily: a photo always gets the same words. Raises
    UserError."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # Half precision on a GPU; before Ampere cuDNN has no convolution in bf16.
    if torch.device(device).type == "cpu":
        dtype = torch.float32
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[choose_half_precision()]

    # Without a chat template a model continues the question in place of answering it.
    flag = "--caption_model"
    processor = load_pretrained(AutoProcessor, name, flag)
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"--caption_model {name} has no chat template: name a model that follows instructions"
        )
    model = load_frozen(
        AutoModelForImageTextToText,
        name,
        flag,
        device,
        dtype=dtype,
        use_safetensors=True,
    )

    # A style's caption begins with the prompt that names it, and goes on with what is shown.
    start = STYLE_ANSWER_START if question == STYLE_QUESTION else ANSWER_START
    shows = ", showing " if start == STYLE_ANSWER_START else ""

    def read(image: Image.Image) -> str:
        inputs = processor.apply_chat_template(
            build_conversation(image, word, question, start),
            continue_final_message=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device, dtype)
        tokens = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)

        # The model returns the question too; the answer lies behind it.
        asked = inputs["input_ids"].shape[1]
        answer = processor.decode(tokens[0, asked:], skip_special_tokens=True)
        found = parse_surroundings(answer)
        return shows + found if found else ""

    return read


def build_conversation(
    image: Image.Image, word: str, question: str, start: str = ANSWER_START
) -> list[dict[str, Any]]:
    """The question about a shrunk copy of the picture, and the beginning of the answer, as chat
    templates take them."""
    small = image.copy()
    small.thumbnail((MAX_INPUT_PX, MAX_INPUT_PX))
    asked = [
        {"type": "image", "image": small},
        {"type": "text", "text": question},
    ]
    begun = [{"type": "text", "text": start.format(word=word)}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": begun}]


def parse_surroundings(answer: str) -> str:
    """The first sentence of an answer that continues START, without its full stop; "" when there is
    none."""
    sentence = re.split(r"[.!?](?:\s|$)|\n", answer.strip(), maxsplit=1)[0]
    printable = "".join(letter for letter in sentence if letter.isprintable())
    words = printable.strip(" \"'“”,;:").split()[:MAX_ANSWER_WORDS]
    return " ".join(words).rstrip(",;:")


@dataclass(frozen=True)
class GeneratedCaption:
    photo: photo_file.Photo
    caption: str | None  # None: why is the `remark`
    remark: str = ""
    key: str = ""  # it is not kept yet


def write_caption_files(
    photos: Iterable[photo_file.Photo], captioner: Captioner, prompt: str
) -> Iterator[GeneratedCaption]:
    """Write `name.txt` beside each photo without a caption. Raises OSError."""
    photos = list(photos)
    for photo in photos:
        target = photo.path.with_suffix(sidecars.CAPTION_SUFFIX)

        # What the user wrote is never written over.
        reason = photo_file.explain_name_conflict(photo, target, photos)
        if photo.is_captioned:
            reason = "it has a caption, which is kept"
        made = (
            GeneratedCaption(photo, None, reason)
            if reason
            else make_caption(photo, captioner, prompt)
        )
        if made.caption is not None:
            write_atomic(target, f"{made.caption}\n")
        yield made


def make_run_caption(
    photo: photo_file.Photo, captioner: Captioner, prompt: str, path: Path
) -> GeneratedCaption:
    """A caption for `keep` to write into the file `path`. If that file has one of the same photo,
    model and words, it is taken."""
    old = sidecars.read_saved_captions(path).get(photo.run_file_name)
    key = photo.compute_key(model=captioner.name, word=captioner.word, prompt=prompt)
    if old and old["made_from"] == key:
        return GeneratedCaption(photo, old["caption"])
    return make_caption(photo, captioner, prompt)


def save_caption(path: Path, generated: GeneratedCaption, prompt: str) -> None:
    """Add a new caption to those in the file. Where the model said nothing, the `prompt` is kept,
    so that it is not asked again."""
    if generated.key:
        entry = {"caption": generated.caption or prompt, "made_from": generated.key}
        known = sidecars.read_saved_captions(path) | {generated.photo.run_file_name: entry}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False))


def make_caption(photo: photo_file.Photo, captioner: Captioner, prompt: str) -> GeneratedCaption:
    """The prompt with the surroundings that the captioner sees in the photo. Nothing is written."""
    found = captioner.surroundings(photo_file.open_rgb(photo))
    key = photo.compute_key(model=captioner.name, word=captioner.word, prompt=prompt)
    if not found:
        remark = "the model says nothing, so no caption is written"
        return GeneratedCaption(photo, caption=None, remark=remark, key=key)
    return GeneratedCaption(photo, prompts.join_caption(prompt, found), key=key)
