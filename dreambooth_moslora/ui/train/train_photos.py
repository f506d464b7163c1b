"""The photos in the form: taken, shown as the run will crop them, with captions to edit and masks
to correct.

A caption and a corrected mask are kept under the digest of their photo's clean copy, and found when
the photo is uploaded again.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageChops

from dreambooth_moslora.base.machine import best_device
from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.captions import load_captioner
from dreambooth_moslora.photos.captions import make as make_caption
from dreambooth_moslora.photos.examine import examine, masked, plans_of
from dreambooth_moslora.photos.folder import MOST_BYTES, find_photos, one_space, photo_report
from dreambooth_moslora.photos.masks import load_segmenter, make_kept, quality_warning
from dreambooth_moslora.photos.photo_file import (
    Photo,
    apply_crop,
    open_again,
    open_mask,
    open_rgb,
    to_rgb,
)
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.photo_copies import MAX_PHOTOS, kept_photos, remove_photos, take_photos
from dreambooth_moslora.ui.train import train_form, train_start
from dreambooth_moslora.ui.train.train_form import DIGEST, folder_of, photos_of
from dreambooth_moslora.ui.workspace import Workspace

EDIT_PX = 768  # Side of the square to paint on: the photo, scaled to it, and a margin
MARGIN = (226, 228, 232)
LEARNED, LEFT_OUT = (13, 148, 136), (225, 29, 72)
"""Colours of the brush: for parts that become white in the mask, and for parts that become black.
"""
TINT = 0.5
# A pixel with at least this alpha counts as painted; the brush is more opaque, its edge less
PAINTED = 64
ROW_PX = 256  # Longer side of the picture beside a caption
NO_MASK = "no mask: all of it is learned"
GONE = "this photo is not there any more; load the page again"
EMPTY = "the mask is empty: paint green what is to be learned of this photo"


@dataclass(frozen=True)
class ShownMask:
    """The mask `path` of a photo, if there is one, and what is to be said of it; `label` names it
    to the user."""

    photo: Path
    path: Path | None
    label: str
    remark: str


def take_with_masks(
    files: list[str],
    workspace: Workspace,
    number: int = 1,
    *,
    keep: bool = False,
) -> list[str]:
    """`take_photos` for subject `number`, with earlier corrections for the same photos."""
    folder = folder_of(workspace.photos_dir, number)
    remarks = take_photos(files, folder, keep=keep)
    for photo in kept_photos(folder):
        if (corrected := corrections_of(workspace, photo)[0]).is_file():
            shutil.copyfile(corrected, beside(photo))
    return remarks


def add_photos(files: list[str], workspace: Workspace, number: int = 1) -> list[str]:
    """Take them after the subject's other photos. Of equal ones the first stays, with the first
    mask. Returns remarks. Raises UserError."""
    with workspace.changing:
        remarks, first, again = take_with_masks(files, workspace, number, keep=True), {}, []
        for photo in photos_of(workspace.photos_dir, number):
            if (known := first.setdefault(file_digest(photo), photo)) != photo:
                again.append(photo)
                of_mask = with_mask_of(known, photo)
                remarks.append(
                    f"photo {number_of(known)} was added once more: it counts once{of_mask}"
                )
        remove_photos(folder_of(workspace.photos_dir, number), again)
    return remarks


def with_mask_of(first: Path, again: Path) -> str:
    """Give a photo that has no mask the one of its copy; returns what became of that, for the
    remark."""
    if not beside(again).is_file():
        return ""
    if not beside(first).is_file():
        beside(again).rename(beside(first))
        return ", now with the mask"
    is_same = file_digest(beside(again)) == file_digest(beside(first))
    return "" if is_same else ", with its first mask; for another, remove it first"


def remove_photo(workspace: Workspace, digest: str, number: int = 1) -> None:
    """Remove a photo from the subject. Its caption and corrected mask are kept for when it is added
    again."""
    folder = folder_of(workspace.photos_dir, number)
    with workspace.changing:
        gone = [photo for photo in kept_photos(folder) if file_digest(photo) == digest]
        remove_photos(folder, gone)
        if not kept_photos(folder):
            shutil.rmtree(folder, ignore_errors=True)


def photo_with(workspace: Workspace, digest: str, number: int = 1) -> Path:
    """The subject's photo of that digest. Raises UserError when it is gone."""
    for photo in photos_of(workspace.photos_dir, number):
        if file_digest(photo) == digest:
            return photo
    raise UserError(GONE)


def caption_file(workspace: Workspace, number: int, digest: str) -> Path:
    return folder_of(workspace.root / "captions", number) / f"{digest}.txt"


def caption_of(workspace: Workspace, number: int, digest: str) -> str:
    file = caption_file(workspace, number, digest)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def keep_captions(workspace: Workspace, number: int, said: Any) -> None:
    """Keep the captions of a subject's rows, [[digest, caption], …]; whatever else is in the list
    is skipped."""
    for row in said[:MAX_PHOTOS] if isinstance(said, list) else ():
        if not (
            isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row)
        ):
            continue
        digest, caption = row[0], one_space(row[1])
        if not DIGEST.fullmatch(digest) or len(caption.encode()) > MOST_BYTES:
            continue
        file = caption_file(workspace, number, digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        if caption != caption_of(workspace, number, digest):
            file.write_text(caption, encoding="utf-8")


def keep_captions_of(workspace: Workspace, subjects: Sequence[train_form.SubjectWords]) -> None:
    """Keep the captions of a form, which has a line for each photo."""
    for number, words in enumerate(subjects, 1):
        digests = list(map(file_digest, photos_of(workspace.photos_dir, number)))
        lines = words.captions.splitlines()
        lines += [""] * (len(digests) - len(lines))
        keep_captions(workspace, number, [list(row) for row in zip(digests, lines)])


def made_captions(
    ctx: state.AppContext,
    form: train_form.TrainForm,
    number: int,
) -> Iterator[tuple[str, str, str]]:
    """(Digest, caption, remark) of each photo of the subject that has no caption. Raises UserError
    without its words, and for a captioner that is not here."""
    words, workspace = form.subjects[number - 1], ctx.workspace
    prompt, class_prompt = train_form.prompts_of(words.token, words.class_word)
    folder = folder_of(workspace.photos_dir, number)
    photos = find_photos(folder, prompt, ctx.resolution_px).photos
    recipe = train_start.recipe_of(ctx, form.like)
    config = train_form.crop_config(
        ctx.base_name, ctx.resolution_px, folder, photos, form.seed, recipe
    )
    captioner = load_captioner(
        replace(config, instance_prompt=prompt, class_prompt=class_prompt), best_device()
    )
    for photo in photos:
        if not caption_of(workspace, number, digest := file_digest(photo.path)):
            made = make_caption(photo, captioner, prompt)
            yield (
                digest,
                made.caption or "",
                f"photo {number_of(photo.path)}: {made.remark}" if made.remark else "",
            )


def shown_masks(config: TrainConfig, workspace: Workspace) -> Iterator[ShownMask]:
    """The masks as a run with these settings uses them; missing ones are made, and kept. Raises
    UserError."""
    subjects = len(config.each_subject)
    for photo, remark in with_made_masks(config, workspace):
        mask = open_mask(photo)
        reason = remark or next(
            (words for words in photo.reasons if words.startswith("mask not used")), ""
        )
        words = NO_MASK if mask is None else quality_warning(mask)
        yield ShownMask(
            photo.path,
            photo.mask_path,
            label_of(photo.path, photo.subject, subjects),
            reason or words,
        )


def with_made_masks(
    config: TrainConfig,
    workspace: Workspace,
    only: Path | None = None,
) -> Iterator[tuple[Photo, str]]:
    """Each photo, or `only` one, with its mask, if it has one, and a remark on a made one."""
    segmenters = (
        [load_segmenter(one) for one in config.each_subject] if config.masks == "auto" else []
    )
    for photo in photo_report(config).photos:
        if only not in (None, photo.path):
            continue
        if photo.mask_path is not None or not segmenters:
            yield photo, ""
            continue
        made = make_kept(photo, segmenters[photo.subject], workspace.folder / "made_masks")
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
    mask, square = open_mask(photo), PIL.Image.new("L", (EDIT_PX, EDIT_PX), 0)
    if mask is not None:
        left, top, right, bottom = place_of((photo.size_px[1], photo.size_px[0]))
        square.paste(
            mask.resize((right - left, bottom - top)).point(as_black_or_white), (left, top)
        )
    return square


def photo_now(workspace: Workspace, path: Path, config: TrainConfig) -> Photo:
    """The photo with its current mask. Raises UserError when it is gone."""
    if (found := next(with_made_masks(config, workspace, path), None)) is None:
        raise UserError(GONE)
    return found[0]


def as_black_or_white(value: int) -> int:
    return 255 * (value > 127)


def place_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Position of a photo of (width, height) in the middle of its square: left, top, right, bottom."""
    scale = EDIT_PX / max(size)
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (EDIT_PX - width) // 2, (EDIT_PX - height) // 2
    return left, top, left + width, top + height


def keep_mask(
    workspace: Workspace,
    photo: Path,
    painted: PIL.Image.Image,
    config: TrainConfig,
) -> None:
    """Save the mask with what was painted (RGBA) on the square, green as white. Raises UserError
    for no white."""
    with PIL.Image.open(photo) as opened:
        size = opened.size
    red, green, _, alpha = painted.resize((EDIT_PX, EDIT_PX)).split()
    is_painted = alpha.point(lambda value: 255 * (value >= PAINTED))
    is_learned = PIL.ImageChops.subtract(green, red).point(lambda value: 255 * (value > 0))
    before = mask_on_square(photo_now(workspace, photo, config))
    square = PIL.Image.composite(is_learned, before, is_painted)
    white = square.crop(place_of(size))
    if white.getextrema()[1] == 0:
        raise UserError(EMPTY)
    with workspace.changing:
        mask = white.resize(size, PIL.Image.Resampling.BILINEAR).point(as_black_or_white)
        corrected, given = corrections_of(workspace, photo)
        corrected.parent.mkdir(parents=True, exist_ok=True)
        if beside(photo).is_file() and not corrected.is_file():
            shutil.copyfile(beside(photo), given)
        mask.convert("1").save(corrected)
        shutil.copyfile(corrected, beside(photo))


def put_back(workspace: Workspace, photo: Path) -> None:
    """Restore the mask that came with the photo, or none; the run may then make one."""
    corrected, given = corrections_of(workspace, photo)
    if not corrected.is_file():
        return
    corrected.unlink()
    if given.is_file():
        given.replace(beside(photo))
    else:
        beside(photo).unlink(missing_ok=True)


def label_of(photo: Path, subject: int, subjects: int) -> str:
    """`photo 3`, or with several subjects `photo 3 of subject 2`; `subject` counts from 0."""
    return f"photo {number_of(photo)}" + (f" of subject {subject + 1}" if subjects > 1 else "")


def number_of(photo: Path) -> int:
    """3 for photo_03.png."""
    return int(photo.stem.partition("_")[2])


def beside(photo: Path) -> Path:
    return photo.with_suffix(".mask.png")


def corrections_of(workspace: Workspace, photo: Path) -> tuple[Path, Path]:
    """Files of the corrected mask, and of the one that came with the photo."""
    folder, digest = workspace.root / "corrected_masks", file_digest(photo)
    return folder / f"{digest}.png", folder / f"{digest}.given.png"


@dataclass(frozen=True)
class PhotoReview:
    """Each kept photo: its file, how it will be cropped, and what is to be said of it; remarks on
    all, as HTML."""

    photos: list[Path]
    crops: list[tuple[PIL.Image.Image, str]]
    remarks: str


def review_kept(
    ctx: state.AppContext,
    remarks: Sequence[str] = (),
    seed: int = 0,
    number: int = 1,
    like: str = NONE,
    masks: Mapping[Path, Path | None] | None = None,
) -> PhotoReview:
    """Judge the clean copies of subject `number`, each by its first crop in a run with this seed
    and recipe. `masks` are those that a run would use, where other ones than beside the photos."""
    folder = folder_of(ctx.workspace.photos_dir, number)
    with ctx.workspace.changing:
        report = examine(find_photos(folder, "", ctx.resolution_px), ctx.resolution_px)
        recipe = train_start.recipe_of(ctx, like)
        config = train_form.crop_config(
            ctx.base_name, ctx.resolution_px, folder, report.photos, seed, recipe
        )
        lines = [
            *remarks,
            *(f"{Path(skipped.path).name}: {skipped.reason}" for skipped in report.skipped),
        ]
        crops = {
            Path(s.path): (to_rgb(open_again(s.path)), f"not used: {s.reason}")
            for s in report.skipped
            if s.is_photo
        }
        for place, photo in enumerate(report.photos):
            plan = next(plans_of(replace(photo, subject=number - 1), place, config))
            shown = replace(photo, mask_path=(masks or {}).get(photo.path, photo.mask_path))
            crop = apply_crop(
                masked(open_rgb(photo), open_mask(shown)), plan, config.image_interpolation_mode
            )
            crops[photo.path] = crop, ", ".join(photo.reasons) or "good"
            lines += (
                [f"photo {number_of(photo.path)}: {', '.join(photo.reasons)}"]
                if photo.reasons
                else []
            )
    each = config.crops_per_photo
    how = (
        "shown as they will be cropped"
        if each == 1
        else f"each shown by the first of its {each} crops"
    )
    count = len(report.photos)
    title = f"{count} photo{'s' * (count != 1)}, {how}."
    photos = sorted(crops)
    return PhotoReview(photos, [crops[photo] for photo in photos], html.remarks_card(lines, title))


def cards_of(
    workspace: Workspace,
    found: PhotoReview,
    number: int,
    made: Mapping[str, str],
) -> list[dict[str, str]]:
    """The cards of `photo_rows`; `made` are captions by the photos' digests."""
    cards = []
    for photo, (picture, remark) in zip(found.photos, found.crops):
        digest = file_digest(photo)
        kept = {"caption": caption_of(workspace, number, digest), "made": made.get(digest, "")}
        cards.append(
            {"photo": digest, "picture": html.thumbnail(picture, ROW_PX), "remark": remark, **kept}
        )
    return cards
