"""Make masks for photos that have none: the segmentation models, and the files that they write.

CLIPSeg (Lüddecke and Ecker, CVPR 2022) reads a word and an image; the embedded base has the toy
world's own network. Both give a probability for each pixel, in fp32. The mask has the pixels of at
least half of the largest one: CLIPSeg's certainty depends more on the word than on the outline.
torch is imported only to load a model.

The user's own masks are never changed. Generated ones are saved

beside the photos    `name.mask.png`, as a user would write it (`check --make_masks`)
in a run folder      `masks/dog.jpg.mask.png` (`--masks auto`); its header records the photo,
                     the model and the word
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import photo_file
from dreambooth_moslora.photos.pretrained import load_frozen, load_pretrained
from dreambooth_moslora.settings import prompts, toy_bases, train_config

KEY_CHUNK = "made-from"
"""PNG text chunk of a saved mask, with a key of its photo, model and word."""
DEFAULT_MASK_MODEL = "CIDAS/clipseg-rd64-refined"
TOY_SEGMENTER = toy_bases.SEGMENTER_FOLDER.name
MIN_PEAK = 0.2
"""Minimum probability of the likeliest pixel; below it the subject was not found."""
MIN_MASK_SHARE = 0.005
MAX_MASK_SHARE = 0.9
"""Shares of the photo between which a mask is plausible."""


def get_segmenter_name(config: train_config.TrainConfig) -> str:
    """Return the model of `--mask_model`: by default the embedded base's own network, or CLIPSeg
    for other bases."""
    if config.mask_model:
        return os.path.expanduser(config.mask_model)
    return (
        TOY_SEGMENTER
        if toy_bases.is_toy(config.pretrained_model_name_or_path)
        else DEFAULT_MASK_MODEL
    )


def get_mask_word(config: train_config.TrainConfig) -> str:
    """Return the word that CLIPSeg looks for: `--mask_prompt`, else the class word; "" for the toy
    world's network. Raises UserError."""
    if get_segmenter_name(config) == TOY_SEGMENTER:
        return ""
    word = config.mask_prompt or prompts.get_class_word(config)
    if not word:
        raise UserError(
            'masks: no word says what the subject is; give --mask_prompt, such as "dog".'
        )
    return word


@dataclass(frozen=True)
class Segmenter:
    """Segmentation model, loaded at its first mask."""

    name: str  # its public name
    word: str  # the subject's word ("" for toys)
    probabilities: Callable[[Image.Image], Any]  # of an RGB image: fp32 (height, width) in [0, 1]

    def mask(self, image: Image.Image) -> Image.Image:
        """Return the mask (L) at the image's size: 255 on the subject, 0 elsewhere; all 0 when no
        subject was found."""
        probabilities = np.asarray(self.probabilities(image))
        peak = float(probabilities.max())
        is_subject = (probabilities >= peak / 2) & (peak >= MIN_PEAK)
        return Image.fromarray(is_subject.astype(np.uint8) * 255)


def load_segmenter(config: train_config.TrainConfig, device: Any = "cpu") -> Segmenter:
    """Return the segmenter of `--mask_model`, which is loaded at the first mask. Raises UserError
    when no word names the subject."""
    name = get_segmenter_name(config)
    word = get_mask_word(config)

    # Loading takes seconds and memory. It waits for the first mask, which may never be needed.
    @cache
    def finder() -> Callable[[Image.Image], Any]:
        return (
            load_toy_segmenter(device)
            if name == TOY_SEGMENTER
            else load_clipseg(name, word, device)
        )

    return Segmenter(get_public_name(name), word, lambda image: finder()(image))


def load_toy_segmenter(device: Any) -> Callable[[Image.Image], Any]:
    """Return a function from an RGB image of the toy world to probabilities (height, width)."""
    import torch

    from dreambooth_moslora.photos.toy_readers import load_segmenter_net

    net = load_segmenter_net(toy_bases.SEGMENTER_FOLDER).to(device)

    def find(image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        return net.compute_logits(pixels[None].to(device))[0].sigmoid().cpu()

    return find


def load_clipseg(name: str, word: str, device: Any) -> Callable[[Image.Image], Any]:
    """Return a function from an RGB image to probabilities (height, width). Raises UserError."""
    import torch
    from torch.nn.functional import interpolate
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    # The model and its preprocessing, in fp32
    flag = "--mask_model"
    processor = load_pretrained(CLIPSegProcessor, name, flag)
    model = load_frozen(CLIPSegForImageSegmentation, name, flag, device, dtype=torch.float32)

    def find(image: Image.Image) -> torch.Tensor:
        inputs = processor(
            text=[word], images=[image], padding=True, truncation=True, return_tensors="pt"
        )
        logits = model(**inputs.to(device)).logits

        # CLIPSeg answers at its own square size; the photo's shape comes back here.
        probabilities = logits.view(1, 1, *logits.shape[-2:]).sigmoid()
        size = (image.height, image.width)
        return interpolate(probabilities, size=size, mode="bilinear")[0, 0].cpu()

    return find


@dataclass(frozen=True)
class GeneratedMask:
    """Mask of a photo, or the reason why it has none."""

    photo: photo_file.Photo
    path: Path | None  # of its mask, if one was made
    remark: str = ""  # for the user


def write_mask_files(
    photos: Iterable[photo_file.Photo], segmenter: Segmenter
) -> Iterator[GeneratedMask]:
    """Write `name.mask.png` beside each photo without a mask, one after the other. Raises
    OSError."""
    photos = list(photos)
    for photo in photos:
        target = photo.path.with_name(f"{photo.path.stem}.mask.png")

        # A user's mask is never written over.
        reason = photo_file.explain_name_conflict(photo, target, photos)
        if photo.mask_path:
            reason = "it has a mask, which is kept"
        yield GeneratedMask(photo, None, reason) if reason else make_mask(photo, target, segmenter)


def make_run_mask(photo: photo_file.Photo, segmenter: Segmenter, folder: Path) -> GeneratedMask:
    """Write the photo's mask into `folder`. An earlier one of the same photo, model and word is
    used again."""
    key = photo.compute_key(model=segmenter.name, word=segmenter.word)
    target = photo_file.get_saved_mask_path(photo, folder)
    target.parent.mkdir(parents=True, exist_ok=True)

    # A resumed run finds its masks here; a changed photo or word gives another key.
    try:
        if target.is_file() and photo_file.open_image(target).info.get(KEY_CHUNK) == key:
            return GeneratedMask(photo, target)
    except photo_file.UnreadableImageError:
        pass  # it is made again
    return make_mask(photo, target, segmenter, key)


def make_mask(
    photo: photo_file.Photo, target: Path, segmenter: Segmenter, key: str = ""
) -> GeneratedMask:
    """Write the mask of the photo's subject to `target`, with the `key` if there is one."""
    mask = segmenter.mask(photo_file.open_rgb(photo))

    # A mask without a white pixel would train on nothing, so the photo is used without one.
    if mask.getextrema()[1] == 0:
        target.unlink(missing_ok=True)  # it was made for another word
        sought = f"“{segmenter.word}”" if segmenter.word else "the subject"
        return GeneratedMask(photo, None, f"empty: {sought} was not found, so no mask is written")

    facts = PngInfo()
    if key:
        facts.add_text(KEY_CHUNK, key)
    png = BytesIO()
    mask.convert("1").save(png, format="PNG", pnginfo=facts, optimize=True)
    write_atomic(target, png.getvalue())
    return GeneratedMask(photo, target, describe_mask_quality(mask))


def describe_mask_quality(mask: Image.Image) -> str:
    """Return a remark on a mask (L, not all black) that looks wrong; "" for a plausible one."""
    share = float((np.asarray(mask) > 127).mean())
    if share < MIN_MASK_SHARE:
        return f"nearly empty: {share:.1%} of the photo"
    if share > MAX_MASK_SHARE:
        return f"nearly the whole picture: {share:.0%} of the photo"
    return ""
