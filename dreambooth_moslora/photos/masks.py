"""Masks: which file is a photo's mask, whether it can be used, its pixels (white on the subject), and the segmenter.

A photo's mask is `name.mask.png` beside it, else its own transparency, else a mask kept in the run folder by
`mask_making`. A key in the header of a made mask records its sources, so that none is made twice.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.core import UserError, is_toy
from dreambooth_moslora.photos.photo import (
    Photo,
    UnreadableImageError,
    alpha_of,
    open_image,
    to_rgb,
    upright,
    upright_size,
)
from dreambooth_moslora.settings.prompts import class_word_of
from dreambooth_moslora.settings.table import TrainConfig

KEY = "made-from"


def marked_png(image: Image.Image, key: str) -> bytes:
    """A PNG with `key`, if any, in its header for `made_from`."""
    facts = PngInfo()
    if key:
        facts.add_text(KEY, key)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=facts, optimize=True)
    return buffer.getvalue()


def made_from(path: Path) -> str | None:
    """The key in the picture's header; None when there is none."""
    try:
        return open_image(path).info.get(KEY) if path.is_file() else None
    except UnreadableImageError:
        return None


CLIPSEG, TOY_SEGMENTER = "CIDAS/clipseg-rd64-refined", "toy-segmenter"


def find_mask(
    path: Path, photo: Image.Image, beside: Path | None, *, alpha_is_mask: bool
) -> tuple[Path | None, list[str]]:
    """(mask file of the photo at `path`, remarks for the user).

    The mask is the file `beside`, or the photo itself if `alpha_is_mask` and part of it is transparent.
    """
    reasons = []
    if beside and beside.is_file():
        problem = mask_problem(beside, upright_size(photo))
        if problem is None:
            return beside, reasons
        reasons.append(f"mask not used: {problem}")
    transparent = alpha_of(photo)
    if transparent is None:
        return None, reasons
    if transparent.getextrema()[1] == 0:
        return None, [*reasons, "entirely transparent: it is a white square"]
    reasons.append("transparent: on white" + (", its opaque part is the mask" if alpha_is_mask else ""))
    return path if alpha_is_mask else None, reasons


def mask_problem(path: Path, photo_px: tuple[int, int]) -> str | None:
    """Why a mask file cannot be used with a photo of this (height, width), or None."""
    try:
        mask = grey_mask(open_image(path))
    except UnreadableImageError as error:
        return str(error)
    height, width = photo_px
    if abs(mask.width / mask.height - width / height) > 0.02 * width / height:
        return f"its shape {mask.width} x {mask.height} is not that of the photo, {width} x {height}"
    return "it is black everywhere" if mask.getextrema()[1] == 0 else None


def grey_mask(image: Image.Image) -> Image.Image:
    """The mask as L, the subject white: the brightness, or the opacity where all of that is black.

    Its maximum becomes 255, so that a file of zeros and ones works too.
    """
    alpha = alpha_of(image)
    if alpha is None:
        grey = to_rgb(image).convert("L")
    else:
        seen = ImageChops.multiply(upright(image).convert("LA").getchannel("L"), alpha)
        grey = alpha if seen.getextrema()[1] == 0 else seen
    brightest = max(grey.getextrema()[1], 1)
    return grey.point([min(255, round(255 * value / brightest)) for value in range(256)])


def open_mask(photo: Photo) -> Image.Image | None:
    """L, 255 on the subject and 0 elsewhere; None without a mask. Raises UserError."""
    if photo.mask_path is None:
        return None
    try:
        image = open_image(photo.mask_path)
    except UnreadableImageError as error:
        raise UserError(f"{photo.mask_path}: {error}; it changed since the folder was read.") from error
    return alpha_of(image) if photo.mask_path == photo.path else grey_mask(image)


def kept_path(photo: Photo, folder: Path) -> Path:
    """The photo's mask in `folder`; `dog.jpg` and `dog.png` have different ones."""
    return folder / f"{photo.kept_name}.mask.png"


def with_kept_masks(photos: Iterable[Photo], folder: Path) -> list[Photo]:
    """The photos; those without a mask of their own get the one that training made, if it is there and fits."""
    return [with_kept_mask(without_kept_mask(photo, folder), kept_path(photo, folder)) for photo in photos]


def with_kept_mask(photo: Photo, path: Path) -> Photo:
    if photo.mask_path is not None or not path.is_file() or mask_problem(path, photo.size_px):
        return photo
    return replace(photo, mask_path=path)


def without_kept_mask(photo: Photo, folder: Path) -> Photo:
    """The photo, without its mask if training made that."""
    return replace(photo, mask_path=None) if photo.mask_path == kept_path(photo, folder) else photo


def segmenter_name(config: TrainConfig) -> str:
    """The model of `--mask_model`; by default the embedded base's own net, or CLIPSeg for other bases."""
    if config.mask_model:
        return os.path.expanduser(config.mask_model)
    return TOY_SEGMENTER if is_toy(config.pretrained_model_name_or_path) else CLIPSEG


def sought_word(config: TrainConfig) -> str:
    """What CLIPSeg looks for: `--mask_prompt`, else the class word; "" for the toy world's net, which needs none.

    Raises UserError when there is no such word.
    """
    if segmenter_name(config) == TOY_SEGMENTER:
        return ""
    word = config.mask_prompt or class_word_of(config)
    if not word:
        raise UserError('masks: no word says what the subject is; give --mask_prompt, such as "dog".')
    return word
