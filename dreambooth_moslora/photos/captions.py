"""Captions made for photos that have none: the models that describe, and the files they leave.

A model describes the surroundings of the subject, but not the subject. For photographs, an instruction-tuned
vision-language model of transformers answers. The default is Qwen3-VL 2B (Apache 2.0, without code of its own); any
model that `AutoModelForImageTextToText` loads and that has a chat template can be named. It continues the text "A photo
of a dog", so its answer is what follows these words in a caption. The embedded base reads place and light by its own
CLIP. This module imports torch only to load a model.

What the user wrote is never changed. The made captions lie

beside the photos    `dog.txt`, as a user would write it (the command `caption`). `.made_captions.json` lists
                     the made ones; a caption that was edited since counts as the user's
in a run folder      `captions.json` (`--captions auto`). It records the photo, model and words of each
                     caption, so that a resumed run does not make it again

Both files: {"dog.jpg": {"caption": "a photo of a sks dog on the beach", "made_from": key}}.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreambooth_moslora.core import (
    UserError,
    assets_folder,
    atomic_write,
    content_key,
    file_digest,
    half_precision,
    is_toy,
    public_name,
)
from dreambooth_moslora.photos.folder import CAPTION_SUFFIX, MADE_CAPTIONS, kept_captions
from dreambooth_moslora.photos.photo import Photo, open_rgb, why_not_beside
from dreambooth_moslora.settings.prompts import class_word_of, joined
from dreambooth_moslora.settings.table import TrainConfig

if TYPE_CHECKING:
    import torch

QWEN, TOY_CLIP = "Qwen/Qwen3-VL-2B-Instruct", "toy-sdxl"
QUESTION = (
    "Write the end of a caption: in at most twenty words, where the {word} is, what is around it, the light and the "
    "side from which it is seen. Say nothing about how the {word} itself looks."
)
START = "A photo of a {word}"
SEEN_PX, MOST_TOKENS, MOST_WORDS = 768, 60, 30
"""Longer side of the photo that the model sees; most tokens of its answer; most words that are used of it. SDXL
reads 77 tokens, including the instance prompt."""


@dataclass(frozen=True)
class Captioner:
    """`name` is the model's public name, `word` what the photos show.

    `surroundings` takes an RGB picture and returns words such as "on the beach at sunset", or "" when it finds
    none.
    """

    name: str
    word: str
    surroundings: Callable[[Image.Image], str]


def captioner_name(config: TrainConfig) -> str:
    """The model of `--caption_model`; by default the embedded base's own CLIP, or Qwen3-VL for other bases."""
    if config.caption_model:
        return os.path.expanduser(config.caption_model)
    return TOY_CLIP if is_toy(config.pretrained_model_name_or_path) else QWEN


def load_captioner(config: TrainConfig, device: "torch.device | str" = "cpu") -> Captioner:
    """The captioner of `--caption_model`. The model is loaded when the first caption is made.

    Raises UserError without a class word; making a caption raises it when the model is missing or of another
    kind.
    """
    name, word = captioner_name(config), class_word_of(config)
    if not word and name == TOY_CLIP:
        word = "toy"
    if not word:
        raise UserError('captions: no word says what the photos show; name it behind the rare word, as in "sks dog".')
    reader = cache(lambda: toy_reader(word, device) if name == TOY_CLIP else chat_reader(name, word, device))
    return Captioner(public_name(name), word, lambda image: reader()(image))


def toy_reader(word: str, device: "torch.device | str") -> Callable[[Image.Image], str]:
    from dreambooth_moslora.photos.toy_readers import SurroundingsReader, phrase

    reader = SurroundingsReader(assets_folder() / TOY_CLIP, device)
    return lambda image: phrase(*reader.read(image, word))


def chat_reader(name: str, word: str, device: "torch.device | str") -> Callable[[Image.Image], str]:
    """A captioner by a chat model. Decoding is greedy, so that a photo always gets the same words.

    Raises UserError for a model without a chat template or with missing weights.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from dreambooth_moslora.photos.mask_making import loaded

    about = {"flag": "--caption_model", "what": "vision-language model", "trust_remote_code": False}
    dtype = getattr(torch, reading_dtype(torch.device(device).type))
    processor = loaded(AutoProcessor, name, **about)
    if not getattr(processor, "chat_template", None):
        raise UserError(f"--caption_model {name} has no chat template: name a model that follows instructions")
    model, found = loaded(
        AutoModelForImageTextToText, name, **about, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if lacking := sorted(found["missing_keys"]):
        raise UserError(f"--caption_model {name}: its files lack {lacking[0]}")
    model = model.requires_grad_(False).eval().to(device)

    def read(image: Image.Image) -> str:
        inputs = processor.apply_chat_template(
            conversation(image, word), continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device, dtype)
        found = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        return surroundings_in(processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return read


def reading_dtype(device_type: str) -> str:
    """fp32 on a CPU, and on a GPU the half precision that it has: before Ampere cuDNN has no convolution in bf16."""
    if device_type == "cuda":
        return {"bf16": "bfloat16", "fp16": "float16"}[half_precision()]
    return "float32" if device_type == "cpu" else "bfloat16"


def conversation(image: Image.Image, word: str) -> list[dict[str, Any]]:
    """The question about a picture, and the beginning of its answer."""
    small = image.copy()
    small.thumbnail((SEEN_PX, SEEN_PX))
    asked = [{"type": "image", "image": small}, {"type": "text", "text": QUESTION.format(word=word)}]
    begun = [{"type": "text", "text": START.format(word=word)}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": begun}]


def surroundings_in(answer: str) -> str:
    """The first sentence of an answer that continues START, without its full stop; "" when there is none."""
    sentence = re.split(r"[.!?](?:\s|$)|\n", answer.strip(), maxsplit=1)[0]
    printable = "".join(letter for letter in sentence if letter.isprintable())
    words = printable.strip(" \"'“”,;:").split()[:MOST_WORDS]
    return " ".join(words).rstrip(",;:")


@dataclass(frozen=True)
class MadeCaption:
    """The result for one photo: its new `caption`, or None and the reason as a `remark`. With a `key` it is not kept
    yet."""

    photo: Photo
    caption: str | None
    remark: str = ""
    key: str = ""


def make_beside(
    photos: Iterable[Photo], captioner: Captioner, prompt: str, *, anew: bool = False
) -> Iterator[MadeCaption]:
    """Write `name.txt` beside each photo without a caption: `prompt` and the surroundings. Raises OSError.

    With `anew`, earlier made captions that were not edited are made again.
    """
    photos = list(photos)
    for photo in photos:
        target = photo.path.with_suffix(CAPTION_SUFFIX)
        is_old = was_made(photo, target)
        if is_old and not anew:
            reason = "it has a made caption, which is kept (--overwrite_made replaces it)"
        elif not is_old and photo.is_captioned:
            reason = "it has a caption, which is kept"
        else:
            reason = why_not_beside(photo, target, photos, replaces=is_old)
        yield MadeCaption(photo, None, reason) if reason else make_one_beside(photo, target, captioner, prompt)


def was_made(photo: Photo, target: Path) -> bool:
    """Whether the file still holds the caption that was made."""
    made = kept_captions(target.with_name(MADE_CAPTIONS)).get(photo.path.name)
    try:
        return made is not None and target.read_text(encoding="utf-8").strip() == made["caption"]
    except (OSError, UnicodeDecodeError):
        return False


def make_one_beside(photo: Photo, target: Path, captioner: Captioner, prompt: str) -> MadeCaption:
    made = make(photo, captioner, prompt)
    if made.caption is not None:
        note(target.with_name(MADE_CAPTIONS), photo, made.caption, key_of(photo, captioner, prompt))
        try:
            atomic_write(target, f"{made.caption}\n")
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return MadeCaption(photo, None, "its name is too long for a caption beside it: rename it")
    return made


def make_for_run(photo: Photo, captioner: Captioner, prompt: str, path: Path) -> MadeCaption:
    """A caption that `keep` writes into the file `path`. One there of the same photo, model and words is taken."""
    key, old = key_of(photo, captioner, prompt), kept_captions(path).get(photo.kept_name)
    if old and old["made_from"] == key:
        return MadeCaption(photo, old["caption"])
    return replace(make(photo, captioner, prompt), key=key)


def keep(path: Path, made: MadeCaption, prompt: str) -> None:
    """Write a new caption into the file; the `prompt` where there is none."""
    if made.key:
        note(path, made.photo, made.caption or prompt, made.key)


def key_of(photo: Photo, captioner: Captioner, prompt: str) -> str:
    return content_key(photo=file_digest(photo.path), model=captioner.name, word=captioner.word, prompt=prompt)


def make(photo: Photo, captioner: Captioner, prompt: str) -> MadeCaption:
    found = captioner.surroundings(open_rgb(photo))
    if not found:
        return MadeCaption(photo, None, "the model says nothing, so no caption is written")
    return MadeCaption(photo, joined(prompt, found))


def note(path: Path, photo: Photo, caption: str, key: str) -> None:
    """Add one photo's caption to those in the file."""
    known = kept_captions(path) | {photo.kept_name: {"caption": caption, "made_from": key}}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False))
