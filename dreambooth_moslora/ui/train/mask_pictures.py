"""Masks as pictures: as a run uses them, as the brush corrects them, and as they are shown."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import PIL.ImageChops
import PIL.ImageFilter

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.masks import load_segmenter, make_kept, quality_warning
from dreambooth_moslora.photos.photo_file import Photo, open_mask, open_rgb
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.workspace import Workspace

EDIT_PX = 768
"""Side of the square to paint on: the photo, scaled to it, and a margin."""
MARGIN = (226, 228, 232)
"""Colour of the margin."""
LEARNED = (13, 148, 136)
"""Colour of the brush for parts that become white in the mask."""
LEFT_OUT = (225, 29, 72)
"""Colour of the brush for parts that become black."""
TINT = 0.5
"""How much of `LEARNED` lies over the white part of the present mask."""
PAINTED = 64
"""A pixel with at least this alpha counts as painted; the brush is more opaque, its edge less."""
OUTLINE = (45, 240, 200)
"""Colour of the line around the part that a mask teaches most."""
LINES = 120
"""Widths of that line in a photo's longer side."""

GONE = "this photo is not there any more; load the page again"
NO_MASK = "no mask: all of it is learned"
EMPTY = "the mask is empty: paint green what is to be learned of this photo"
"""What is told of a photo or of its mask."""


@dataclass(frozen=True)
class ShownMask:
    """A photo's mask, and what is to be said of it."""

    photo: Path
    path: Path | None
    """None: all of the photo is learned."""
    remark: str


def shown_masks(config: TrainConfig, workspace: Workspace) -> Iterator[ShownMask]:
    """The masks as a run with these settings uses them; missing ones are made, and kept.

    Raises UserError where a mask is to be made and cannot be.
    """
    for photo, remark in with_made_masks(config, workspace):
        mask = open_mask(photo)
        # The first reason counts: it was not made, not used, or is not good.
        refused = [words for words in photo.reasons if words.startswith("mask not used")]
        reason = remark or (refused[0] if refused else "")
        if not reason:
            reason = NO_MASK if mask is None else quality_warning(mask)
        yield ShownMask(photo=photo.path, path=photo.mask_path, remark=reason)


def with_made_masks(
    config: TrainConfig,
    workspace: Workspace,
    only: Path | None = None,
) -> Iterator[tuple[Photo, str]]:
    """Each photo, or `only` one, with its mask, if it has one, and a remark on a made one."""
    segmenter = load_segmenter(config) if config.masks != "given" else None
    for photo in photo_report(config).photos:
        if only not in (None, photo.path):
            continue
        if photo.mask_path is not None or segmenter is None:
            yield photo, ""
            continue
        made = make_kept(photo, segmenter, workspace.folder / "made_masks")
        yield replace(photo, mask_path=made.path), made.remark


def editor_picture(workspace: Workspace, path: Path, config: TrainConfig) -> PIL.Image.Image:
    """The photo on its square, tinted where its mask is white. Raises UserError when it is gone."""
    found = photo_now(workspace, path, config)
    photo = open_rgb(found)
    left, top, right, bottom = place_of(photo.size)
    square = PIL.Image.new("RGB", (EDIT_PX, EDIT_PX), MARGIN)
    square.paste(photo.resize((right - left, bottom - top)), (left, top))
    tinted = PIL.Image.blend(square, PIL.Image.new("RGB", square.size, LEARNED), TINT)
    return PIL.Image.composite(tinted, square, mask_on_square(found))


def mask_on_square(photo: Photo) -> PIL.Image.Image:
    """L: the mask that the run would use now; black without one."""
    mask = open_mask(photo)
    square = PIL.Image.new("L", (EDIT_PX, EDIT_PX), 0)
    if mask is not None:
        height, width = photo.size_px
        left, top, right, bottom = place_of((width, height))
        scaled = mask.resize((right - left, bottom - top))
        square.paste(scaled.point(as_black_or_white), (left, top))
    return square


def photo_now(workspace: Workspace, path: Path, config: TrainConfig) -> Photo:
    """The photo with its current mask. Raises UserError when it is gone."""
    for photo, _ in with_made_masks(config, workspace, path):
        return photo
    raise UserError(GONE)


def as_black_or_white(value: int) -> int:
    """A grey value, 0…255, as 0 or 255."""
    return 255 * (value > 127)


def place_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where a photo of (width, height) lies in the middle of its square.

    Returns left, top, right and bottom, px.
    """
    scale = EDIT_PX / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    left = (EDIT_PX - width) // 2
    top = (EDIT_PX - height) // 2
    return left, top, left + width, top + height


def keep_mask(
    workspace: Workspace,
    photo: Path,
    painted: PIL.Image.Image,
    config: TrainConfig,
) -> None:
    """Correct a photo's mask by what was painted on its square, and save it.

    - `painted` is the brush's layer (RGBA): green becomes white, and red black.
    - `config` has the settings of a run, which may make the mask that is corrected.

    Raises UserError when nothing would be learned.
    """
    with PIL.Image.open(photo) as opened:
        size = opened.size
    # What was painted, over the mask of before.
    red, green, _, alpha = painted.resize((EDIT_PX, EDIT_PX)).split()
    is_painted = alpha.point(lambda value: 255 * (value >= PAINTED))
    is_learned = PIL.ImageChops.subtract(green, red).point(lambda value: 255 * (value > 0))
    before = mask_on_square(photo_now(workspace, photo, config))
    square = PIL.Image.composite(is_learned, before, is_painted)
    white = square.crop(place_of(size))
    if white.getextrema()[1] == 0:
        raise UserError(EMPTY)
    mask = white.resize(size, PIL.Image.Resampling.BILINEAR).point(as_black_or_white)
    mask.convert("1").save(beside(photo))


def beside(photo: Path) -> Path:
    """Where a photo's mask lies."""
    return photo.with_suffix(".mask.png")


def outlined(photo: PIL.Image.Image, mask: PIL.Image.Image | None) -> PIL.Image.Image:
    """The photo with a line around the white part of its mask; the photo itself without one."""
    if mask is None:
        return photo
    # A line of the same width in every preview, inside and outside the edge.
    white = mask.resize(photo.size).point(as_black_or_white)
    width = max(1, round(max(photo.size) / LINES))
    outer = white.filter(PIL.ImageFilter.GaussianBlur(width)).point(lambda value: 255 * (value > 8))
    line = PIL.ImageChops.subtract(outer, white)
    return PIL.Image.composite(PIL.Image.new("RGB", photo.size, OUTLINE), photo, line)
