"""Photos in the form: adding and captioning them, and their crops as the run will see them.

A caption and a mask lie beside their photo, where training reads them. The page identifies a photo
by the digest of its clean copy, whatever its number.
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
from dreambooth_moslora.ui.train.train_start import (
    TOY_PHOTOS_REMARK,
    build_config,
    describe_length,
    is_beyond_toy,
)
from dreambooth_moslora.ui.workspace import Workspace

TILE_PX = 256
"""Longer side of a photo in the grid."""


def add_photos(files: list[str], workspace: Workspace) -> list[str]:
    """Add photos after the present ones; of equal ones the first stays, with the sidecars of the
    last. Returns remarks.

    Raises UserError.
    """
    folder = workspace.photos_dir
    with workspace.changing:
        remarks = copy_photos(files, folder)
        first_photos: dict[str, Path] = {}
        duplicates = []
        for photo in list_photo_copies(folder):
            first = first_photos.setdefault(hash_file(photo), photo)
            if first is photo:
                continue
            duplicates.append(photo)
            for sidecar in set(folder.glob(f"{photo.stem}.*")) - {photo}:
                sidecar.replace(folder / f"{first.stem}{sidecar.name.removeprefix(photo.stem)}")
        remove_photos(folder, duplicates)
    return remarks


def remove_photo(workspace: Workspace, digest: str) -> None:
    """Remove a photo with its caption and mask."""
    folder = workspace.photos_dir
    with workspace.changing:
        removed = [photo for photo in list_photo_copies(folder) if hash_file(photo) == digest]
        remove_photos(folder, removed)


def remove_all_photos(workspace: Workspace) -> None:
    """Remove all photos with their captions and masks."""
    with workspace.changing:
        remove_photos(workspace.photos_dir, list_photo_copies(workspace.photos_dir))


def read_caption(photo: Path) -> str:
    """Read the caption beside a photo; "" for none."""
    file = photo.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def write_captions(workspace: Workspace, rows: Sequence[Sequence[str]]) -> None:
    """Write the captions of the rows, [[digest, caption], …], beside their photos."""
    captions = dict(rows)
    with workspace.changing:
        for photo in list_photo_copies(workspace.photos_dir):
            old_caption = read_caption(photo)
            caption = clean_whitespace(captions.get(hash_file(photo), old_caption))
            # Several captions, a line each, stay so until they are edited.
            if caption and caption == clean_whitespace(old_caption):
                continue
            file = photo.with_suffix(".txt")
            file.write_text(caption, encoding="utf-8")
            # An empty caption means the instance prompt, as a missing file does.
            if not caption:
                file.unlink()


def parse_number(photo: Path) -> int:
    """Return 3 for photo_03.png."""
    return int(photo.stem.partition("_")[2])


@dataclass(frozen=True)
class PhotoReview:
    """Crops of the stored photos as a run would use them, with remarks."""

    photos: list[Path]
    crops: list[tuple[PIL.Image.Image, str]]
    """Each photo as it will be cropped, with a remark."""
    remarks: str
    """Remarks on all of them, as HTML."""


def build_review(
    ctx: state.AppContext,
    form: TrainForm,
    remarks: Sequence[str] = (),
    masks: Mapping[Path, Path | None] | None = None,
) -> PhotoReview:
    """Review the clean copies, each by its first crop in a run of this form.

    - `remarks` come before those on all photos together, and those before those on single ones.
    - `masks` are those that a run would use, by photo, if not those beside the photos.
    """
    folder = ctx.workspace.photos_dir
    with ctx.workspace.changing:
        resolution_px = form.get_resolution(ctx.resolution_px)
        report = find_photo_faults(find_photos(folder, "", resolution_px), resolution_px)
        lines = [*remarks, *report.remarks]
        if is_beyond_toy(ctx):
            lines.append(TOY_PHOTOS_REMARK)
        crops = {}
        # Show photos that no run uses whole.
        for skipped in report.skipped:
            if skipped.is_photo:
                lines.append(f"photo {parse_number(Path(skipped.path))}: {skipped.reason}")
                whole = to_rgb(require_image(skipped.path))
                crops[Path(skipped.path)] = whole, f"not used: {skipped.reason}"
        # Crop the others, with the outlines of their masks. The crops do not depend on the token
        # and class word, which may still be missing.
        photos = report.photos
        length = ""
        if photos:
            form_with_words = replace(form, token=DEFAULT_TOKEN, class_word="subject")
            config = build_config(ctx, form_with_words, photos)
            photos = add_faces(config, photos)
            length = describe_length(ctx.jobs, config, len(photos))
        for photo_index, photo in enumerate(photos):
            plan = next(plan_crops(photo, photo_index, config))
            masked = replace(photo, mask_path=(masks or {}).get(photo.path, photo.mask_path))
            pixels = draw_outline(open_rgb(photo), open_mask(masked))
            crop = apply_crop(pixels, plan)
            reasons = ", ".join(photo.reasons)
            crops[photo.path] = crop, reasons or "good"
            if reasons:
                lines.append(f"photo {parse_number(photo.path)}: {reasons}")
    photo_paths = sorted(crops)
    return PhotoReview(
        photos=photo_paths,
        crops=[crops[photo] for photo in photo_paths],
        remarks=render_photo_remarks(len(photos), len(crops), lines, length),
    )


def render_photo_remarks(used: int, count: int, faults: list[str], length: str) -> str:
    """Render the remarks on all photos.

    - `used` of the `count` photos are usable.
    - `faults` are a line each.
    - `length` is that of the run.
    """
    photos = f"{count} photo{'' if count == 1 else 's'}"
    if used < count:
        photos = f"{used} of {photos}"
    title = f"{photos} will be used, cropped as shown"
    if length:
        title += f": {length}"
    return html.render_remarks(faults, f"{title}.") if faults else html.render_faint(f"{title}.")


def build_cards(review: PhotoReview) -> list[dict[str, str]]:
    """Build the cards of `build_photo_rows`."""
    cards = []
    for photo, (crop, remark) in zip(review.photos, review.crops):
        card = {
            "photo": hash_file(photo),
            "picture": html.encode_thumbnail(crop, TILE_PX),
            "remark": remark,
            "caption": read_caption(photo),
        }
        cards.append(card)
    return cards
