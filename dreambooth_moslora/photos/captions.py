"""Caption photos that have no caption: the captioning models, and the files that they write.

A model describes the surroundings of the subject, but not the subject. For photographs it is
Qwen3-VL 2B (Apache 2.0), or another model with a chat template, which continues the text "A photo
of a dog"; for the embedded base its own CLIP names place and light. torch is imported only to load
a model. Captions of the user are never changed. Generated ones are saved

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

DEFAULT_CAPTION_MODEL = "Qwen/Qwen3-VL-2B-Instruct"
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
"""Questions for the chat model, and the beginnings of its answer, which it continues."""
MAX_INPUT_PX = 768
"""The photo's longer side as the model sees it: more pixels cost time and change few words."""
TOY_CAPTIONER_WARNING = (
    "captions: the toy knows its own world alone, and invents where other things are: write them "
    "yourself, or train a larger base"
)
MAX_ANSWER_TOKENS = 60
MAX_ANSWER_WORDS = 30
"""Bounds of an answer: SDXL reads 77 tokens."""


@dataclass(frozen=True)
class Captioner:
    """Captioning model, loaded at its first caption."""

    name: str  # the model's public name
    word: str  # class word, with the traits that the caption names or omits
    surroundings: Callable[[Image.Image], str]  # of an RGB image: "on the beach at sunset", or ""


def load_captioner(config: train_config.TrainConfig, device: Any = "cpu") -> Captioner:
    """Return the captioner of `--caption_model`: by default the embedded base's own CLIP, or
    Qwen3-VL.

    The model is loaded onto the torch device at the first caption. Raises UserError without a class
    word, and later for a missing model.
    """
    toy_model = toy_bases.CLIP_FOLDER.name
    default = (
        toy_model
        if toy_bases.is_toy(config.pretrained_model_name_or_path)
        else DEFAULT_CAPTION_MODEL
    )
    name = os.path.expanduser(config.caption_model or default)

    # The word is what the model must not describe.
    kind = subject_kinds.get_subject_kind(config.each_subject[0])
    word = prompts.get_class_word(config) or ("toy" if name == toy_model else "")
    word = "picture" if kind.is_style and not word else word
    if not word:
        raise UserError(
            "captions: no word says what the photos show; "
            'name it behind the rare word, as in "sks dog".'
        )

    # Photos of toys have their facts beside them.
    folder = config.each_subject[0].instance_data_dir
    if name == toy_model and folder and not (Path(folder) / SUBJECT_FILE).is_file():
        logger.warning(TOY_CAPTIONER_WARNING)

    # A vision-language model has gigabytes. Loading waits until a photo needs a caption.
    @cache
    def reader() -> Callable[[Image.Image], str]:
        if name == toy_model:
            return load_toy_captioner(word, device)
        return load_chat_captioner(name, word, device, build_question(config, word))

    # Captions that say other traits are made again.
    omitted = (f"no {trait}" for trait in subject_kinds.list_omitted_traits(config))
    subject = " ".join((word, *config.describe, *omitted))
    return Captioner(get_public_name(name), subject, lambda image: reader()(image))


def build_question(config: train_config.TrainConfig, word: str) -> str:
    """Return the prompt for the chat model: it asks for the surroundings, and for the traits of
    `--describe`."""
    if subject_kinds.get_subject_kind(config).is_style:
        return STYLE_QUESTION
    looks = NO_LOOKS_INSTRUCTION.format(word=word)
    if config.describe:
        looks = f"Say too how the {word}'s {' and '.join(config.describe)} look, and nothing else"
        looks += f" about the {word}."
    omitted = subject_kinds.list_omitted_traits(config)
    if omitted:
        looks += f" Do not mention {', '.join(omitted)} or the face."
    return SUBJECT_QUESTION.format(word=word, looks=looks)


def load_toy_captioner(word: str, device: Any) -> Callable[[Image.Image], str]:
    """Return a captioner by the CLIP of the embedded base."""
    from dreambooth_moslora.photos.toy_readers import SurroundingsReader, format_surroundings

    reader = SurroundingsReader(toy_bases.CLIP_FOLDER, device)
    return lambda image: format_surroundings(*reader.read(image, word))


def load_chat_captioner(
    name: str, word: str, device: Any, question: str
) -> Callable[[Image.Image], str]:
    """Return a captioner by a chat model. Greedy decoding gives a photo the same caption each time.
    Raises UserError."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # Half precision on a GPU; before Ampere cuDNN has no convolution in bf16.
    precision = "fp32" if torch.device(device).type == "cpu" else choose_half_precision()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

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
        question_tokens = inputs["input_ids"].shape[1]
        answer = processor.decode(tokens[0, question_tokens:], skip_special_tokens=True)
        surroundings = parse_surroundings(answer)
        return shows + surroundings if surroundings else ""

    return read


def build_conversation(
    image: Image.Image, word: str, question: str, start: str = ANSWER_START
) -> list[dict[str, Any]]:
    """Return a chat of the question about a shrunk copy of the image, and the beginning of the
    answer."""
    small = image.copy()
    small.thumbnail((MAX_INPUT_PX, MAX_INPUT_PX))
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": small}, {"type": "text", "text": question}],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": start.format(word=word)}],
        },
    ]


def parse_surroundings(answer: str) -> str:
    """Return the first sentence of an answer that continues `start`, without its full stop; "" when
    there is none."""
    sentence = re.split(r"[.!?](?:\s|$)|\n", answer.strip(), maxsplit=1)[0]
    printable = "".join(letter for letter in sentence if letter.isprintable())
    first_words = printable.strip(" \"'“”,;:").split()[:MAX_ANSWER_WORDS]
    return " ".join(first_words).rstrip(",;:")


@dataclass(frozen=True)
class GeneratedCaption:
    """Caption of a photo, or the reason why it has none."""

    photo: photo_file.Photo
    caption: str | None  # None: `remark` says why
    remark: str = ""
    key: str = ""  # of a caption that is not saved yet


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
        generated = (
            GeneratedCaption(photo, None, reason)
            if reason
            else make_caption(photo, captioner, prompt)
        )
        if generated.caption is not None:
            write_atomic(target, f"{generated.caption}\n")
        yield generated


def make_run_caption(
    photo: photo_file.Photo, captioner: Captioner, prompt: str, path: Path
) -> GeneratedCaption:
    """Return a caption, which `save_caption` adds to the file `path`. A caption in that file by the
    same model, from the same photo and question, is used again."""
    saved = sidecars.read_saved_captions(path).get(photo.run_file_name)
    key = photo.compute_key(model=captioner.name, word=captioner.word, prompt=prompt)
    if saved and saved["made_from"] == key:
        return GeneratedCaption(photo, saved["caption"])
    return make_caption(photo, captioner, prompt)


def save_caption(path: Path, generated: GeneratedCaption, prompt: str) -> None:
    """Add a new caption to those in the file. For an empty answer the `prompt` is saved, so that a
    resumed run does not caption the photo again."""
    if generated.key:
        entry = {"caption": generated.caption or prompt, "made_from": generated.key}
        captions = sidecars.read_saved_captions(path) | {generated.photo.run_file_name: entry}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(captions, indent=1, sort_keys=True, ensure_ascii=False))


def make_caption(photo: photo_file.Photo, captioner: Captioner, prompt: str) -> GeneratedCaption:
    """Return the prompt followed by the surroundings that the captioner sees in the photo. Nothing
    is written."""
    surroundings = captioner.surroundings(photo_file.open_rgb(photo))
    key = photo.compute_key(model=captioner.name, word=captioner.word, prompt=prompt)
    if not surroundings:
        return GeneratedCaption(
            photo, None, remark="the model says nothing, so no caption is written", key=key
        )
    return GeneratedCaption(photo, prompts.join_caption(prompt, surroundings), key=key)
