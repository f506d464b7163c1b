"""Masks made by a `Segmenter` for photos that have none. The user's own masks are never changed.

beside the photos    `name.mask.png`, as a user would write it (`check --make_masks`)
in a run folder      `masks/dog.jpg.mask.png` (`--masks auto`); its header records photo, model and word,
                     so that a resumed run does not make it again
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.photos.made_pictures import made_from, marked_png
from dreambooth_moslora.photos.masks import kept_path
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.photos.segmenters import Segmenter

__all__ = ["MadeMask", "make_beside", "make_kept", "quality_warning"]

SMALLEST_SHARE, LARGEST_SHARE = 0.005, 0.9
"""Fractions of the photo; a mask outside this range is probably wrong."""
MOST_PIECES = 3
LOOK_PX = 64
SPECK = 0.02
"""Pieces below this fraction of the mask are not counted."""


@dataclass(frozen=True)
class MadeMask:
    """The result for one photo: the `path` of its mask if one was made, and a `remark` for the user."""

    photo: Photo
    path: Path | None
    remark: str = ""


def make_beside(photos: Iterable[Photo], segmenter: Segmenter) -> Iterator[MadeMask]:
    """Write `name.mask.png` beside each photo without a mask, one after the other. Raises OSError."""
    photos = list(photos)
    named = Counter(photo.path.stem for photo in photos)
    for photo in photos:
        target = photo.path.with_name(f"{photo.path.stem}.mask.png")
        if photo.mask_path is not None:
            yield MadeMask(photo, None, "it has a mask, which is kept")
        elif named[photo.path.stem] > 1:
            yield MadeMask(photo, None, f"another photo has the name {photo.path.stem} too: rename one of them")
        elif target.exists():
            yield MadeMask(photo, None, f"{target.name} exists but cannot be used; it is kept")
        else:
            yield make(photo, target, segmenter)


def make_kept(photos: Iterable[Photo], segmenter: Segmenter, folder: Path) -> Iterator[MadeMask]:
    """Like `make_beside`, but into `folder`. A mask made before from the same photo, model and word is kept."""
    for photo in photos:
        key = content_key(photo=file_digest(photo.path), model=segmenter.name, word=segmenter.word)
        target = kept_path(photo, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        is_made = made_from(target) == key
        yield MadeMask(photo, target) if is_made else make(photo, target, segmenter, key)


def make(photo: Photo, target: Path, segmenter: Segmenter, key: str = "") -> MadeMask:
    mask = segmenter.mask(open_rgb(photo))
    if mask.getextrema()[1] == 0:
        target.unlink(missing_ok=True)  # it was made for another word
        sought = f"“{segmenter.word}”" if segmenter.word else "the subject"
        return MadeMask(photo, None, f"empty: {sought} was not found, so no mask is written")
    write_mask(target, mask, key)
    return MadeMask(photo, target, quality_warning(mask))


def write_mask(path: Path, mask: Image.Image, key: str) -> None:
    atomic_write(path, marked_png(mask.convert("1"), key))


def quality_warning(mask: Image.Image) -> str:
    """What looks wrong with a mask (L, not all black), in words; "" when nothing does."""
    share = float((np.asarray(mask) > 127).mean())
    if share < SMALLEST_SHARE:
        return f"nearly empty: {share:.1%} of the photo"
    if share > LARGEST_SHARE:
        return f"nearly the whole picture: {share:.0%} of the photo"
    pieces = pieces_of(mask)
    return f"in {pieces} pieces: look whether all are the subject" if pieces > MOST_PIECES else ""


def pieces_of(mask: Image.Image) -> int:
    """How many connected pieces a mask has, without specks."""
    small = mask.resize((LOOK_PX, LOOK_PX), Image.Resampling.BOX).point(lambda value: 255 * (value > 127))
    white = np.asarray(small) > 0
    whole, count = white.sum(), 0
    while white.any():
        row, column = np.argwhere(white)[0]
        ImageDraw.floodfill(small, (int(column), int(row)), 0)
        left = np.asarray(small) > 0
        count += int(white.sum() - left.sum() >= SPECK * whole)
        white = left
    return count
