"""A visitor's photos: taken, shown as the run will crop them, with masks to correct.

A corrected mask is kept under the digest of its photo's clean copy, and found when the photo is uploaded again.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import PIL.ImageChops

from dreambooth_moslora.core import UserError, file_digest
from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.photos import masks, photo_file
from dreambooth_moslora.photos.examine import examine, masked, plans_of
from dreambooth_moslora.photos.folder import find_photos, photo_report
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui import html, state, train_form, train_start, visitors

EDIT_PX = 768  # Side of the square to paint on: the photo, scaled to it, and a margin
MARGIN = (226, 228, 232)
LEARNED, LEFT_OUT = (13, 148, 136), (225, 29, 72)
"""Colours of the brush: for parts that become white in the mask, and for parts that become black."""
TINT = 0.5
PAINTED = 64  # A pixel with at least this alpha counts as painted; the brush is more opaque, its edge less
MOST_KEPT = 200  # Most files of corrections per visitor; the oldest are deleted
NO_MASK = "no mask: all of it is learned"
GONE = "this photo is not there any more; show the masks again"
EMPTY = "the mask is empty: paint green what is to be learned of this photo"


@dataclass(frozen=True)
class ShownMask:
    """`photo` is the clean copy's `name_of`, `label` its name for the user; `picture` is dark outside the mask."""

    photo: str
    label: str
    picture: PIL.Image.Image
    remark: str


def take_with_masks(files: list[str], visitor: visitors.Visitor, number: int = 1) -> list[str]:
    """`take_photos` for subject `number`, with earlier corrections for the same photos."""
    folder = train_form.folder_of(visitor.photos_dir, number)
    remarks = visitors.take_photos(files, folder)
    for photo in visitors.kept_photos(folder):
        if (corrected := corrections_of(visitor, photo)[0]).is_file():
            shutil.copyfile(corrected, beside(photo))
    return remarks


def shown_masks(config: TrainConfig, visitor: visitors.Visitor) -> Iterator[ShownMask]:
    """The masks as a run with these settings uses them; missing ones are made, and kept. Raises UserError."""
    photos, counts = list(with_made_masks(config, visitor)), Counter()
    is_several = len({photo.subject for photo, _ in photos}) > 1
    for photo, remark in photos:
        counts[photo.subject] += 1
        label = f"photo {counts[photo.subject]}" + (f" of subject {photo.subject + 1}" if is_several else "")
        mask = photo_file.open_mask(photo)
        reason = remark or next((words for words in photo.reasons if words.startswith("mask not used")), "")
        words = NO_MASK if mask is None else masks.quality_warning(mask)
        image = photo_file.open_rgb(photo)
        image.thumbnail((EDIT_PX, EDIT_PX))
        yield ShownMask(name_of(photo.path, visitor), label, masked(image, mask), reason or words)


def with_made_masks(config: TrainConfig, visitor: visitors.Visitor) -> Iterator[tuple[photo_file.Photo, str]]:
    """Each photo with its mask, if it has one, and a remark on a made one."""
    segmenters = [masks.load_segmenter(one) for one in config.each_subject] if config.masks == "auto" else []
    for photo in photo_report(config).photos:
        if photo.mask_path is not None or not segmenters:
            yield photo, ""
            continue
        made = masks.make_kept(photo, segmenters[photo.subject], visitor.folder / "made_masks")
        yield replace(photo, mask_path=made.path), made.remark


def editor_picture(visitor: visitors.Visitor, name: str, config: TrainConfig) -> PIL.Image.Image:
    """The photo of that name on its square, tinted where its mask is white."""
    found = photo_now(visitor, name, config)
    photo = photo_file.open_rgb(found)
    left, top, right, bottom = place_of(photo.size)
    square = PIL.Image.new("RGB", (EDIT_PX, EDIT_PX), MARGIN)
    square.paste(photo.resize((right - left, bottom - top)), (left, top))
    tinted = PIL.Image.blend(square, PIL.Image.new("RGB", square.size, LEARNED), TINT)
    return PIL.Image.composite(tinted, square, mask_on_square(found))


def mask_on_square(photo: photo_file.Photo) -> PIL.Image.Image:
    """L: the mask that the run would use now; black without one."""
    mask, square = photo_file.open_mask(photo), PIL.Image.new("L", (EDIT_PX, EDIT_PX), 0)
    if mask is not None:
        left, top, right, bottom = place_of((photo.size_px[1], photo.size_px[0]))
        square.paste(mask.resize((right - left, bottom - top)).point(as_black_or_white), (left, top))
    return square


def photo_now(visitor: visitors.Visitor, name: str, config: TrainConfig) -> photo_file.Photo:
    """The photo of that name with its current mask. Raises UserError when it is gone."""
    found = (photo for photo, _ in with_made_masks(config, visitor) if name_of(photo.path, visitor) == name)
    if (photo := next(found, None)) is None:
        raise UserError(GONE)
    return photo


def as_black_or_white(value: int) -> int:
    return 255 * (value > 127)


def place_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Position of a photo of (width, height) in the middle of its square: left, top, right, bottom."""
    scale = EDIT_PX / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (EDIT_PX - width) // 2, (EDIT_PX - height) // 2
    return left, top, left + width, top + height


def keep_mask(visitor: visitors.Visitor, name: str, painted: PIL.Image.Image, config: TrainConfig) -> None:
    """Save the mask with what was painted (RGBA) on the square, green as white. Raises UserError for no white."""
    photo = photo_called(visitor, name)
    with PIL.Image.open(photo) as opened:
        size = opened.size
    red, green, _, alpha = painted.resize((EDIT_PX, EDIT_PX)).split()
    is_painted = alpha.point(lambda value: 255 * (value >= PAINTED))
    is_learned = PIL.ImageChops.subtract(green, red).point(lambda value: 255 * (value > 0))
    square = PIL.Image.composite(is_learned, mask_on_square(photo_now(visitor, name, config)), is_painted)
    white = square.crop(place_of(size))
    if white.getextrema()[1] == 0:
        raise UserError(EMPTY)
    with visitors.ONE_AT_A_TIME:
        mask = white.resize(size, PIL.Image.Resampling.BILINEAR).point(as_black_or_white)
        corrected, given = corrections_of(visitor, photo)
        corrected.parent.mkdir(parents=True, exist_ok=True)
        if beside(photo).is_file() and not corrected.is_file():
            shutil.copyfile(beside(photo), given)
        mask.convert("1").save(corrected)
        shutil.copyfile(corrected, beside(photo))
    for path in sorted(corrected.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_KEPT]:
        path.unlink(missing_ok=True)


def put_back(visitor: visitors.Visitor, name: str) -> None:
    """Restore the mask that came with the photo, or none; the run may then make one."""
    photo = photo_called(visitor, name)
    corrected, given = corrections_of(visitor, photo)
    if not corrected.is_file():
        return
    corrected.unlink()
    if given.is_file():
        given.replace(beside(photo))
    else:
        beside(photo).unlink(missing_ok=True)


def photo_called(visitor: visitors.Visitor, name: str) -> Path:
    """The photo's path. Raises UserError when the visitor has no photo of that name."""
    for number in range(1, train_form.MOST_SUBJECTS + 1):
        for photo in visitors.kept_photos(train_form.folder_of(visitor.photos_dir, number)):
            if name_of(photo, visitor) == name:
                return photo
    raise UserError(GONE)


def name_of(photo: Path, visitor: visitors.Visitor) -> str:
    """`photo_01.png`; for a further subject with its folder, `photos_2/photo_01.png`."""
    return photo.name if photo.parent == visitor.photos_dir else f"{photo.parent.name}/{photo.name}"


def beside(photo: Path) -> Path:
    return photo.with_suffix(".mask.png")


def corrections_of(visitor: visitors.Visitor, photo: Path) -> tuple[Path, Path]:
    """Files of the corrected mask, and of the one that came with the photo."""
    folder, digest = visitor.root / "corrected_masks", file_digest(photo)
    return folder / f"{digest}.png", folder / f"{digest}.given.png"


@dataclass(frozen=True)
class PhotoReview:
    """Thumbnails as they will be cropped (path, caption), and remarks, as HTML."""

    crops: list[tuple[PIL.Image.Image, str]]
    remarks: str


def review_kept(
    ctx: state.AppContext,
    visitor: visitors.Visitor,
    remarks: Sequence[str] = (),
    seed: int = 0,
    number: int = 1,
    like: str = NONE,
) -> PhotoReview:
    """Judge the clean copies of subject `number`, each by its first crop in a run with this seed and recipe."""
    folder = train_form.folder_of(visitor.photos_dir, number)
    report = examine(find_photos(folder, "", ctx.resolution_px), ctx.resolution_px)
    recipe = train_start.recipe_of(ctx, like, visitor)
    config = train_form.crop_config(ctx.base_name, ctx.resolution_px, folder, report.photos, seed, recipe)
    crops, lines = [], [*remarks, *(f"{Path(skipped.path).name}: {skipped.reason}" for skipped in report.skipped)]
    for place, photo in enumerate(report.photos):
        plan = next(plans_of(replace(photo, subject=number - 1), place, config))
        crop = photo_file.apply_crop(
            masked(photo_file.open_rgb(photo), photo_file.open_mask(photo)), plan, config.image_interpolation_mode
        )
        crops.append((crop, ", ".join(photo.reasons) or "good"))
        lines += [f"photo {place + 1}: {', '.join(photo.reasons)}"] if photo.reasons else []
    each = config.crops_per_photo
    how = "shown as they will be cropped" if each == 1 else f"each shown by the first of its {each} crops"
    return PhotoReview(crops, html.remarks_card(lines, f"{len(crops)} photo{'s' * (len(crops) != 1)}, {how}."))
