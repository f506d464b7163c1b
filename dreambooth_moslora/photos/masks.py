"""Masks: which file is a photo's mask, whether it can be used, and its pixels (white on the subject).

A photo's mask is `name.mask.png` beside it, else its own transparency.
"""

from pathlib import Path

from PIL import Image, ImageChops

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.photos.image_file import (
    UnreadableImageError,
    alpha_of,
    open_image,
    to_rgb,
    upright,
    upright_size,
)
from dreambooth_moslora.photos.photo import Photo

__all__ = ["find_mask", "grey_mask", "mask_problem", "open_mask"]


def find_mask(
    path: Path, photo: Image.Image, beside: Path | None, *, alpha_is_mask: bool
) -> tuple[Path | None, list[str]]:
    """(file of the mask of the photo at `path`, what a person may want to know).

    The mask is the file `beside`, else the photo itself, when `alpha_is_mask` and part of it is transparent.
    """
    reasons = []
    if beside and beside.is_file():
        problem = mask_problem(beside, photo)
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


def mask_problem(path: Path, photo: Image.Image) -> str | None:
    """Why a mask file cannot be used with the photo, or None."""
    try:
        mask = grey_mask(open_image(path))
    except UnreadableImageError as error:
        return str(error)
    height, width = upright_size(photo)
    if abs(mask.width / mask.height - width / height) > 0.02 * width / height:
        return f"its shape {mask.width} x {mask.height} is not that of the photo, {width} x {height}"
    return "it is black everywhere" if mask.getextrema()[1] == 0 else None


def grey_mask(image: Image.Image) -> Image.Image:
    """L, the subject white: what is bright, or what is opaque where all of that is black.

    Its brightest becomes 255, so that a file of zeros and ones is a mask too.
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
    """L, 255 where the subject is and 0 where it is not; None when nobody says."""
    if photo.mask_path is None:
        return None
    try:
        image = open_image(photo.mask_path)
    except UnreadableImageError as error:
        raise UserError(f"{photo.mask_path}: {error}; it changed since the folder was read.") from error
    return alpha_of(image) if photo.mask_path == photo.path else grey_mask(image)
