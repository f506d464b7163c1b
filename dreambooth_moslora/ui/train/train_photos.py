"""The photos in the form: they are taken, and shown as the run will crop them.

Their captions can be edited, and their masks corrected: both lie beside the photo, where a training
reads them. The page knows a photo by the digest of its clean copy, whatever its number.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import PIL.ImageChops
import PIL.ImageFilter

from dreambooth_moslora.base.machine import best_device
from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.beside import one_space
from dreambooth_moslora.photos.captions import load_captioner
from dreambooth_moslora.photos.captions import make as make_caption
from dreambooth_moslora.photos.cropping import apply_crop
from dreambooth_moslora.photos.examine import examine, plans_of
from dreambooth_moslora.photos.folder import find_photos, photo_report
from dreambooth_moslora.photos.masks import load_segmenter, make_kept, quality_warning
from dreambooth_moslora.photos.photo_file import Photo, open_again, open_mask, open_rgb, to_rgb
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.photo_copies import kept_photos, remove_photos, take_photos
from dreambooth_moslora.ui.train import train_form
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
TILE_PX = 256
"""Longer side of a picture in the grid."""
OUTLINE = (45, 240, 200)
"""Colour of the line around the part that a mask teaches most."""
LINES = 120
"""Widths of that line in a photo's longer side."""

# What is told of a photo or of its mask.
NO_MASK = "no mask: all of it is learned"
GONE = "this photo is not there any more; load the page again"
EMPTY = "the mask is empty: paint green what is to be learned of this photo"


@dataclass(frozen=True)
class ShownMask:
    """A photo's mask, and what is to be said of it."""

    photo: Path
    path: Path | None
    """None: all of the photo is learned."""
    remark: str


def add_photos(files: list[str], workspace: Workspace) -> list[str]:
    """Take photos after the others; of equal ones the first stays. Returns remarks.

    Raises UserError.
    """
    with workspace.changing:
        remarks = take_photos(files, workspace.photos_dir, keep=True)
        known = set()
        again = []
        for photo in kept_photos(workspace.photos_dir):
            digest = file_digest(photo)
            if digest in known:
                again.append(photo)
            known.add(digest)
        remove_photos(workspace.photos_dir, again)
    return remarks


def remove_photo(workspace: Workspace, digest: str) -> None:
    """Remove a photo with its caption and mask."""
    folder = workspace.photos_dir
    with workspace.changing:
        gone = [photo for photo in kept_photos(folder) if file_digest(photo) == digest]
        remove_photos(folder, gone)


def photo_with(workspace: Workspace, digest: str) -> Path:
    """The photo of that digest. Raises UserError when it is gone."""
    for photo in kept_photos(workspace.photos_dir):
        if file_digest(photo) == digest:
            return photo
    raise UserError(GONE)


def caption_of(photo: Path) -> str:
    """The caption beside a photo; "" for none."""
    file = photo.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def keep_captions(workspace: Workspace, said: Sequence[Sequence[str]]) -> None:
    """Write the captions of the rows, [[digest, caption], …], beside their photos."""
    captions = dict(said)
    with workspace.changing:
        for photo in kept_photos(workspace.photos_dir):
            caption = one_space(captions.get(file_digest(photo), caption_of(photo)))
            file = photo.with_suffix(".txt")
            file.write_text(caption, encoding="utf-8")
            # An empty caption is the instance prompt, as none is.
            if not caption:
                file.unlink()


def made_captions(
    ctx: state.AppContext, token: str, class_word: str, seed: int
) -> Iterator[tuple[str, str, str]]:
    """(Digest, caption, remark) of each photo that has no caption.

    - `token` and `class_word` call the subject, which captions leave out.
    - `seed` is the form's.

    Raises UserError without the words, and for a captioner that is not here.
    """
    workspace = ctx.workspace
    prompt, class_prompt = train_form.prompts_of(token, class_word)
    photos = find_photos(workspace.photos_dir, prompt, ctx.resolution_px).photos
    config = train_form.crop_config(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=workspace.photos_dir,
        photos=photos,
        seed=seed,
    )
    config = replace(config, instance_prompt=prompt, class_prompt=class_prompt)
    captioner = load_captioner(config, best_device())
    # One at a time, so that the page can tell how far it is.
    for photo in photos:
        if caption_of(photo.path):
            continue
        made = make_caption(photo, captioner, prompt)
        remark = f"photo {number_of(photo.path)}: {made.remark}" if made.remark else ""
        yield file_digest(photo.path), made.caption or "", remark


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


def number_of(photo: Path) -> int:
    """3 for photo_03.png."""
    return int(photo.stem.partition("_")[2])


def beside(photo: Path) -> Path:
    """Where a photo's mask lies."""
    return photo.with_suffix(".mask.png")


@dataclass(frozen=True)
class PhotoReview:
    """What a run would make of the kept photos."""

    photos: list[Path]
    crops: list[tuple[PIL.Image.Image, str]]
    """Each photo as it will be cropped, and what is to be said of it."""
    remarks: str
    """On all of them, as HTML."""


def review_kept(
    ctx: state.AppContext,
    remarks: Sequence[str] = (),
    seed: int = 0,
    masks: Mapping[Path, Path | None] | None = None,
) -> PhotoReview:
    """Judge the clean copies, each by its first crop in a run of this form.

    - `remarks` come before those on all photos together, and those before those on single ones.
    - `seed` is the form's, which decides the crops.
    - `masks` are those that a run would use, by photo, if not those beside the photos.
    """
    folder = ctx.workspace.photos_dir
    with ctx.workspace.changing:
        report = examine(find_photos(folder, "", ctx.resolution_px), ctx.resolution_px)
        config = train_form.crop_config(
            base=ctx.base_name,
            resolution_px=ctx.resolution_px,
            photos_dir=folder,
            photos=report.photos,
            seed=seed,
        )
        lines = [*remarks, *report.remarks]
        crops = {}
        # Photos that no run uses are shown whole.
        for skipped in report.skipped:
            if skipped.is_photo:
                lines.append(f"photo {number_of(Path(skipped.path))}: {skipped.reason}")
                whole = to_rgb(open_again(skipped.path))
                crops[Path(skipped.path)] = whole, f"not used: {skipped.reason}"
        # The others are cropped, with a line around what their masks teach most.
        for place, photo in enumerate(report.photos):
            plan = next(plans_of(photo, place, config))
            shown = replace(photo, mask_path=(masks or {}).get(photo.path, photo.mask_path))
            pixels = outlined(open_rgb(photo), open_mask(shown))
            crop = apply_crop(pixels, plan, config.image_interpolation_mode)
            reasons = ", ".join(photo.reasons)
            crops[photo.path] = crop, reasons or "good"
            if reasons:
                lines.append(f"photo {number_of(photo.path)}: {reasons}")
    photos = sorted(crops)
    return PhotoReview(
        photos=photos,
        crops=[crops[photo] for photo in photos],
        remarks=told_of(len(report.photos), lines),
    )


def told_of(count: int, faults: list[str]) -> str:
    """What is said of all photos, as HTML: `count` are usable, and `faults` are a line each."""
    plural = "" if count == 1 else "s"
    title = f"{count} photo{plural}, shown as the run will crop them"
    if not faults:
        return html.faint(f"{title}.")
    return html.remarks_card(faults, f"{title}. Worth a look:")


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


def cards_of(found: PhotoReview, made: Mapping[str, str]) -> list[dict[str, str]]:
    """The cards of `photo_rows`; `made` are captions by the photos' digests."""
    cards = []
    for photo, (picture, remark) in zip(found.photos, found.crops):
        digest = file_digest(photo)
        card = {
            "photo": digest,
            "picture": html.thumbnail(picture, TILE_PX),
            "remark": remark,
            "caption": caption_of(photo),
            "made": made.get(digest, ""),
        }
        cards.append(card)
    return cards
