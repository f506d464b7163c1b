"""Uploaded photos become clean copies: upright, RGB, without EXIF or a stranger's file name."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from PIL import ImageOps, UnidentifiedImageError

from dreambooth_moslora.errors import UserError

__all__ = ["PHOTO_TYPES", "Intake", "take_photos"]

PHOTO_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".bmp", ".tif", ".tiff"]
FORMATS = ["JPEG", "PNG", "WEBP", "HEIF", "AVIF", "BMP", "TIFF"]
MAX_PHOTOS = 50
MAX_PHOTO_BYTES = 30 * 1024**2
MAX_SIDE_PX = 4096


@dataclass(frozen=True)
class Intake:
    """The folder of clean copies, and one line for each file that was refused."""

    folder: Path
    refused: tuple[str, ...]


def take_photos(files: list[str], folder: Path) -> Intake:
    """Copy the photos into an empty `folder` as photo_01.png …; raises UserError when none is usable."""
    if not files:
        raise UserError("add some photos of your subject first")
    if len(files) > MAX_PHOTOS:
        raise UserError(f"{len(files)} photos are too many; {MAX_PHOTOS} at most, and 4 to 10 good ones are enough")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    refused = []
    for number, file in enumerate(files, 1):
        try:
            clean_copy(Path(file)).save(folder / f"photo_{number:02d}.png")
        except UserError as error:
            refused.append(str(error))
    if len(refused) == len(files):
        raise UserError(f"none of the files is a usable photo: {refused[0]}")
    return Intake(folder, tuple(refused))


def clean_copy(file: Path) -> PIL.Image.Image:
    """Pixels alone, turned upright, at most 4096 px a side. Raises UserError for anything but a sane photo."""
    _register_heif()
    if file.stat().st_size > MAX_PHOTO_BYTES:
        raise UserError(f"{file.name} is larger than {MAX_PHOTO_BYTES // 2**20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(file, formats=FORMATS) as opened:
                opened.draft("RGB", (MAX_SIDE_PX, MAX_SIDE_PX))
                upright = ImageOps.exif_transpose(opened)
                clean = PIL.Image.new(mode := "RGBA" if "A" in upright.getbands() else "RGB", upright.size)
                clean.paste(upright.convert(mode))
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UserError(f"{file.name} has too many pixels") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file.name} is no photo that can be read") from error
    clean.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), PIL.Image.Resampling.LANCZOS)
    return clean


def _register_heif() -> None:
    """Photos of most phones are HEIC; Pillow reads them through a plug-in."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()
