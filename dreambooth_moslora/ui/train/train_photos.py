"""The photos in the form: they are taken, captioned, and shown as the run will crop them.

A caption and a mask lie beside their photo, where a training reads them. The page knows a photo by
the digest of its clean copy, whatever its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image

from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.photos.augment import apply_crop
from dreambooth_moslora.photos.faces import with_faces
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_again, open_mask, open_rgb, to_rgb
from dreambooth_moslora.photos.quality import examine, plans_of
from dreambooth_moslora.photos.sidecars import one_space
from dreambooth_moslora.plan.defaults import TOKEN
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.photo_copies import kept_photos, remove_photos, take_photos
from dreambooth_moslora.ui.train.mask_pictures import outlined
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import settings_of
from dreambooth_moslora.ui.workspace import Workspace

TILE_PX = 256
"""Longer side of a picture in the grid."""


def add_photos(files: list[str], workspace: Workspace) -> list[str]:
    """Take photos after the others; of equal ones the first stays. Returns remarks.

    Raises UserError.
    """
    with workspace.changing:
        remarks = take_photos(files, workspace.photos_dir)
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


def number_of(photo: Path) -> int:
    """3 for photo_03.png."""
    return int(photo.stem.partition("_")[2])


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
    form: TrainForm,
    remarks: Sequence[str] = (),
    masks: Mapping[Path, Path | None] | None = None,
) -> PhotoReview:
    """Judge the clean copies, each by its first crop in a run of this form.

    - `remarks` come before those on all photos together, and those before those on single ones.
    - `masks` are those that a run would use, by photo, if not those beside the photos.
    """
    folder = ctx.workspace.photos_dir
    with ctx.workspace.changing:
        report = examine(find_photos(folder, "", ctx.resolution_px), ctx.resolution_px)
        lines = [*remarks, *report.remarks]
        crops = {}
        # Photos that no run uses are shown whole.
        for skipped in report.skipped:
            if skipped.is_photo:
                lines.append(f"photo {number_of(Path(skipped.path))}: {skipped.reason}")
                whole = to_rgb(open_again(skipped.path))
                crops[Path(skipped.path)] = whole, f"not used: {skipped.reason}"
        # The others are cropped, with a line around what their masks teach most. The crops do not
        # depend on the words, which may be missing yet.
        photos = report.photos
        if photos:
            worded = replace(form, token=TOKEN, class_word="subject")
            config = settings_of(ctx, worded, photos)
            photos = with_faces(config, photos)
        for place, photo in enumerate(photos):
            plan = next(plans_of(photo, place, config))
            masked = replace(photo, mask_path=(masks or {}).get(photo.path, photo.mask_path))
            pixels = outlined(open_rgb(photo), open_mask(masked))
            crop = apply_crop(pixels, plan)
            reasons = ", ".join(photo.reasons)
            crops[photo.path] = crop, reasons or "good"
            if reasons:
                lines.append(f"photo {number_of(photo.path)}: {reasons}")
    shown = sorted(crops)
    return PhotoReview(
        photos=shown,
        crops=[crops[photo] for photo in shown],
        remarks=told_of(len(report.photos), lines),
    )


def told_of(count: int, faults: list[str]) -> str:
    """What is said of all photos, as HTML: `count` are usable, and `faults` are a line each."""
    plural = "" if count == 1 else "s"
    title = f"{count} photo{plural}, each as the run will crop it"
    if not faults:
        return html.faint(f"{title}.")
    return html.remarks_card(faults, f"{title}:")


def cards_of(found: PhotoReview) -> list[dict[str, str]]:
    """The cards of `photo_rows`."""
    cards = []
    for photo, (picture, remark) in zip(found.photos, found.crops):
        card = {
            "photo": file_digest(photo),
            "picture": html.thumbnail(picture, TILE_PX),
            "remark": remark,
            "caption": caption_of(photo),
        }
        cards.append(card)
    return cards
