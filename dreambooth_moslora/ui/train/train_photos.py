"""The photos in the form: they are taken, captioned, and shown as the run will crop them.

A caption and a mask lie beside their photo, where a training reads them. The page knows a photo by
the digest of its clean copy, whatever its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image

from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.photos.augment import apply_crop
from dreambooth_moslora.photos.faces import add_faces
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_mask, open_rgb, require_image, to_rgb
from dreambooth_moslora.photos.quality import find_photo_faults, plan_crops
from dreambooth_moslora.photos.sidecars import clean_whitespace
from dreambooth_moslora.plan.defaults import DEFAULT_TOKEN
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.photo_copies import copy_photos, list_photo_copies, remove_photos
from dreambooth_moslora.ui.train.mask_pictures import draw_outline
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import build_config
from dreambooth_moslora.ui.workspace import Workspace

TILE_PX = 256
"""Longer side of a picture in the grid."""


def add_photos(files: list[str], workspace: Workspace) -> list[str]:
    """Take photos after the others; of equal ones the first stays. Returns remarks.

    Raises UserError.
    """
    with workspace.changing:
        remarks = copy_photos(files, workspace.photos_dir)
        known = set()
        again = []
        for photo in list_photo_copies(workspace.photos_dir):
            digest = hash_file(photo)
            if digest in known:
                again.append(photo)
            known.add(digest)
        remove_photos(workspace.photos_dir, again)
    return remarks


def remove_photo(workspace: Workspace, digest: str) -> None:
    """Remove a photo with its caption and mask."""
    folder = workspace.photos_dir
    with workspace.changing:
        gone = [photo for photo in list_photo_copies(folder) if hash_file(photo) == digest]
        remove_photos(folder, gone)


def read_caption(photo: Path) -> str:
    """The caption beside a photo; "" for none."""
    file = photo.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def write_captions(workspace: Workspace, rows: Sequence[Sequence[str]]) -> None:
    """Write the captions of the rows, [[digest, caption], …], beside their photos."""
    captions = dict(rows)
    with workspace.changing:
        for photo in list_photo_copies(workspace.photos_dir):
            caption = clean_whitespace(captions.get(hash_file(photo), read_caption(photo)))
            file = photo.with_suffix(".txt")
            file.write_text(caption, encoding="utf-8")
            # An empty caption is the instance prompt, as none is.
            if not caption:
                file.unlink()


def parse_number(photo: Path) -> int:
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


def build_review(
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
        report = find_photo_faults(find_photos(folder, "", ctx.resolution_px), ctx.resolution_px)
        lines = [*remarks, *report.remarks]
        crops = {}
        # Photos that no run uses are shown whole.
        for skipped in report.skipped:
            if skipped.is_photo:
                lines.append(f"photo {parse_number(Path(skipped.path))}: {skipped.reason}")
                whole = to_rgb(require_image(skipped.path))
                crops[Path(skipped.path)] = whole, f"not used: {skipped.reason}"
        # The others are cropped, with a line around what their masks teach most. The crops do not
        # depend on the words, which may be missing yet.
        photos = report.photos
        if photos:
            worded = replace(form, token=DEFAULT_TOKEN, class_word="subject")
            config = build_config(ctx, worded, photos)
            photos = add_faces(config, photos)
        for place, photo in enumerate(photos):
            plan = next(plan_crops(photo, place, config))
            masked = replace(photo, mask_path=(masks or {}).get(photo.path, photo.mask_path))
            pixels = draw_outline(open_rgb(photo), open_mask(masked))
            crop = apply_crop(pixels, plan)
            reasons = ", ".join(photo.reasons)
            crops[photo.path] = crop, reasons or "good"
            if reasons:
                lines.append(f"photo {parse_number(photo.path)}: {reasons}")
    shown = sorted(crops)
    return PhotoReview(
        photos=shown,
        crops=[crops[photo] for photo in shown],
        remarks=render_photo_remarks(len(report.photos), lines),
    )


def render_photo_remarks(count: int, faults: list[str]) -> str:
    """What is said of all photos, as HTML: `count` are usable, and `faults` are a line each."""
    plural = "" if count == 1 else "s"
    title = f"{count} photo{plural}, each as the run will crop it"
    if not faults:
        return html.render_faint(f"{title}.")
    return html.render_remarks(faults, f"{title}:")


def build_cards(review: PhotoReview) -> list[dict[str, str]]:
    """The cards of `build_photo_rows`."""
    cards = []
    for photo, (picture, remark) in zip(review.photos, review.crops):
        card = {
            "photo": hash_file(photo),
            "picture": html.encode_thumbnail(picture, TILE_PX),
            "remark": remark,
            "caption": read_caption(photo),
        }
        cards.append(card)
    return cards
