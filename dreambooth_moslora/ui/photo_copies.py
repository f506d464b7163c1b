"""Clean copies of the photos that were dropped on the page.

A copy is upright, has no metadata, and at most 4096 px a side. The copies are photo_01.png …, with
their masks photo_01.mask.png … and captions photo_01.txt …
"""

import hashlib
import shutil
import tempfile
from collections.abc import Collection
from functools import cache
from pathlib import Path

import PIL.Image

from dreambooth_moslora.disk.atomic import rename_with_retry
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import photo_file as images
from dreambooth_moslora.photos.photo_file import to_grey_mask
from dreambooth_moslora.photos.sidecars import (
    CAPTION_SUFFIX,
    MASK_SUFFIX,
    FolderCaptions,
    find_sidecars,
    parse_sidecar_name,
)

PHOTO_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".bmp", ".tif", ".tiff"]
"""Suffixes of photos and masks."""
DROPPED_TYPES = [*PHOTO_TYPES, CAPTION_SUFFIX]
"""Suffixes that the page's field for photos accepts."""
MAX_PHOTOS = 50
"""Photos of one subject at most."""
MAX_SIDE_PX = 4096
"""Longer side of a copy; a larger photo is made smaller."""


def copy_photos(files: list[str], folder: Path) -> list[str]:
    """Copy photos, their masks and captions into `folder`, after its photos.

    The folder is replaced whole. Returns remarks. Raises UserError for too many photos, and when no
    file is usable.
    """
    # Separate masks and captions from photos, by their names.
    paths = list(map(Path, files))
    sidecars = find_sidecars(paths)
    photos = [file for file in paths if parse_sidecar_name(file) is None]
    if not photos and sidecars:
        raise UserError("drop captions and masks together with their photos")
    if not photos:
        raise UserError("add some photos of your subject first")
    old_count = len(list_photo_copies(folder))
    count = old_count + len(photos)
    if count > MAX_PHOTOS:
        raise UserError(
            f"{count} photos are too many; {MAX_PHOTOS} at most, and 3 to 10 good ones are enough"
        )
    # Fill a folder beside it, and replace the old one when all copies are written.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        if old_count:
            shutil.copytree(folder, new)
        else:
            new.mkdir()
        remarks = copy_all(photos, sidecars, new, old_count)
        is_empty = len(list_photo_copies(new)) == old_count
        if not (old_count and is_empty):
            shutil.rmtree(folder, ignore_errors=True)
            rename_with_retry(new, folder)
    if is_empty:
        raise UserError(f"none of the files is a usable photo: {remarks[0]}")
    return remarks


def list_photo_copies(folder: Path) -> list[Path]:
    """List the clean copies in their order, without the masks."""
    return sorted(path for path in folder.glob("photo_*.png") if "." not in path.stem)


def remove_photos(folder: Path, removed: Collection[Path]) -> None:
    """Delete these photos with their masks, and renumber the remaining ones."""
    for photo in removed:
        for file in folder.glob(f"{photo.stem}.*"):
            file.unlink()
    # Close the gaps in the numbers, by which the form counts photos.
    for number, photo in enumerate(list_photo_copies(folder), 1):
        for file in folder.glob(f"{photo.stem}.*"):
            file.rename(folder / f"photo_{number:02d}{file.name.removeprefix(photo.stem)}")


def copy_all(
    photos: list[Path], sidecars: dict[tuple[str, str], Path], folder: Path, count: int = 0
) -> list[str]:
    """Write clean copies with their masks and captions; return the remarks.

    - `photos` become the copies, in this order.
    - `sidecars` are those of `find_sidecars`; masks are written in plain grey.
    - `folder` has `count` photos already, after which these are numbered.
    """
    remarks = []
    captions = FolderCaptions(folder, sidecars)
    for photo in photos:
        try:
            clean = clean_copy(photo)
        except images.UnreadableImageError as error:
            remarks.append(f"{photo.name}: {error}")
            continue
        count += 1
        clean.save(folder / f"photo_{count:02d}.png")
        # An unreadable mask does not exclude its photo.
        if mask := sidecars.get((photo.stem, MASK_SUFFIX)):
            try:
                grey = to_grey_mask(images.open_image(mask))
                grey.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
                grey.save(folder / f"photo_{count:02d}.mask.png")
            except images.UnreadableImageError as error:
                remarks.append(f"{mask.name}: {error}")
        if lines := captions.get_captions(photo):
            (folder / f"photo_{count:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    remarks += [f"{file.name}: {reason}" for file, reason in captions.complaints]
    stems = {photo.stem for photo in photos}
    for (stem, _), file in sidecars.items():
        if stem not in stems:
            remarks.append(f"{file.name}: no photo of this name was dropped with it")
    return remarks


def are_sample_photos(copies: Collection[Path]) -> bool:
    """Return whether all are copies of sample subjects' photos, the toys of the embedded bases."""
    return hash_samples().issuperset(map(hash_pixels, copies))


@cache
def hash_samples() -> frozenset[str]:
    """Return the digests of the photos of all sample subjects."""
    files = (get_assets_folder() / "subjects").glob("*/*.jpg")
    return frozenset(map(hash_pixels, files))


def hash_pixels(file: Path) -> str:
    """Return a digest of an image's pixels, whatever its file format."""
    with PIL.Image.open(file) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def clean_copy(file: Path) -> PIL.Image.Image:
    """Return the upright pixels without metadata. Raises UnreadableImageError."""
    opened = images.open_image(file)
    clean = images.to_rgb(opened)
    alpha = images.get_alpha(opened)
    if alpha is not None:
        clean.putalpha(alpha)
    clean.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), PIL.Image.Resampling.LANCZOS)
    # A new image has the pixels and nothing else.
    bare = PIL.Image.new(clean.mode, clean.size)
    bare.paste(clean)
    return bare
