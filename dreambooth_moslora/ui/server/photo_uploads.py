"""Uploaded photos become clean copies: upright, RGB, without EXIF and without the user's file names.

`name.mask.png` among them is the mask of the photo `name`, as in a folder on the command line.
"""

import shutil
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from dreambooth_moslora.core.errors import UserError

__all__ = ["PHOTO_TYPES", "Intake", "kept_photos", "take_photos"]

PHOTO_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".bmp", ".tif", ".tiff"]
MAX_PHOTOS = 50
MAX_PHOTO_BYTES = 30 * 1024**2
MAX_SIDE_PX = 4096
MAX_PIXELS = 120 * 10**6
MAX_PIXELS_TOGETHER = 600 * 10**6
"""Limit for all files of a request: 50 photos of 12 megapixels. A core takes about 30 megapixels a second."""
ONE_AT_A_TIME = threading.Lock()
"""Lock over all visitors: decoding a photo of 120 megapixels takes up to a gigabyte."""


@dataclass(frozen=True)
class Intake:
    """The folder of clean copies, and one line for each file that was refused or turned."""

    folder: Path
    remarks: tuple[str, ...]


def take_photos(files: list[str], folder: Path) -> Intake:
    """Copy the photos into an empty `folder` as photo_01.png …, and their masks as photo_01.mask.png ….

    The folder is replaced atomically: two tabs of one visitor may send theirs at the same time. Raises
    UserError when no file is usable.
    """
    from dreambooth_moslora.photos.sidecars import MASK_SUFFIX, sidecar_of, sidecars_of

    named_masks = [file for file in map(Path, files) if (sidecar_of(file) or ("", ""))[1] == MASK_SUFFIX]
    masks = {stem: file for (stem, _), file in sidecars_of(named_masks).items()}
    photos = [file for file in map(Path, files) if file not in named_masks]
    if not photos:
        raise UserError("add some photos of your subject first")
    if len(photos) > MAX_PHOTOS:
        raise UserError(f"{len(photos)} photos are too many; {MAX_PHOTOS} at most, and 4 to 10 good ones are enough")
    check_sum([*photos, *masks.values()])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
        (new := Path(scratch) / folder.name).mkdir()
        remarks = copy_all(photos, masks, new)
        is_empty = not any(new.iterdir())
        with ONE_AT_A_TIME:
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    if is_empty:
        raise UserError(f"none of the files is a usable photo: {remarks[0]}")
    return Intake(folder, tuple(remarks))


def kept_photos(folder: Path) -> list[Path]:
    """The clean copies in their order, without the masks."""
    return sorted(path for path in folder.glob("photo_*.png") if "." not in path.stem)


def copy_all(photos: list[Path], masks: dict[str, Path], folder: Path) -> list[str]:
    """Write clean copies as photo_01.png … beside their masks (by the photo's stem); returns the remarks."""
    remarks, taken = [], 0
    for photo in photos:
        try:
            with ONE_AT_A_TIME:
                clean, was_turned = clean_copy(photo)
        except UserError as error:
            remarks.append(str(error))
            continue
        taken += 1
        clean.save(folder / f"photo_{taken:02d}.png")
        remarks += [f"photo {taken}: rotated by EXIF, turned upright"] if was_turned else []
        remarks += copy_mask(masks.get(photo.stem), folder / f"photo_{taken:02d}.mask.png")
    stems = {photo.stem for photo in photos}
    return remarks + [f"{mask.name}: a mask of no photo that is here" for s, mask in masks.items() if s not in stems]


def copy_mask(mask: Path | None, target: Path) -> list[str]:
    """Write a photo's mask as plain grey; returns the reasons if that is impossible."""
    from dreambooth_moslora.photos.image_file import UnreadableImageError, open_image
    from dreambooth_moslora.photos.masks import grey_mask

    if mask is None:
        return []
    try:
        with ONE_AT_A_TIME:
            check_size(mask)
            grey_mask(open_image(mask, MAX_SIDE_PX)).save(target)
    except (UserError, UnreadableImageError) as error:
        return [str(error) if isinstance(error, UserError) else f"{mask.name}: {error}"]
    return []


def clean_copy(file: Path) -> tuple[PIL.Image.Image, bool]:
    """The upright pixels (and transparency) only, at most 4096 px a side, and whether EXIF had turned them.

    Raises UserError for anything else.
    """
    from dreambooth_moslora.photos.image_file import UnreadableImageError, alpha_of, is_rotated, open_image, to_rgb

    check_size(file)
    try:
        opened = open_image(file, MAX_SIDE_PX)
        clean, alpha = to_rgb(opened), alpha_of(opened)
    except UnreadableImageError as error:
        raise UserError(f"{file.name}: {error}") from error
    if alpha is not None:
        clean.putalpha(alpha)
    bare = PIL.Image.new(clean.mode, clean.size)
    bare.paste(clean)
    return bare, is_rotated(opened)


def check_sum(files: list[Path]) -> None:
    """Raises UserError for files with too many pixels in total: all visitors' photos are processed one at a time."""
    pixels = sum(pixels_of(file) for file in files)
    if pixels > MAX_PIXELS_TOGETHER:
        most = MAX_PIXELS_TOGETHER // 10**6
        raise UserError(f"the photos have {pixels / 1e6:.0f} megapixels together; at most {most} are taken at a time")


def check_size(file: Path) -> None:
    """Raises UserError for a file above 30 MiB, or above 120 megapixels by its header; nothing is decoded."""
    if file.stat().st_size > MAX_PHOTO_BYTES:
        raise UserError(f"{file.name} is larger than {MAX_PHOTO_BYTES // 2**20} MiB")
    if (pixels := pixels_of(file)) > MAX_PIXELS:
        raise UserError(f"{file.name} has {pixels / 1e6:.0f} megapixels; at most {MAX_PIXELS // 10**6} are read")


def pixels_of(file: Path) -> int:
    """Pixels by the file's header; 0 for a file that is no image, which `open_image` explains later. Raises
    UserError."""
    from dreambooth_moslora.photos.image_file import FORMATS, register_heif

    register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(file, formats=FORMATS) as image:
                return image.width * image.height
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{file.name} has too many pixels") from error
    except (OSError, ValueError, SyntaxError):
        return 0
