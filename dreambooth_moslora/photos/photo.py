"""One photo: its file from any phone or program as upright sRGB pixels, its captions and its mask.

Only this module handles orientation (EXIF), colour profiles, transparency (on white), CMYK, Lab, palettes, greys and 16
bits. Sizes are (height, width) px of the upright picture.
"""

import errno
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from dreambooth_moslora.core import UserError, content_key, file_digest, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")
"""Formats that are read as photos; none runs an interpreter (EPS) or fetches anything."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".heic", ".heif", ".hif", ".avif"}
    | {".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".jp2"}
)
OPAQUE_FROM = 250
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the picture upright."""
TILE_PX = 1024
"""Tile side for converting 16- and 32-bit images: all 100 megapixels at once would take 2 GB."""


OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
"""Errors of the machine, not of the picture, which may be readable next time."""


class UnreadableImageError(Exception):
    """The file cannot be read as a picture; the text says why, without the file's name."""


@cache
def register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def open_image(path: Path, longest_px: int | None = None) -> Image.Image:
    """The first frame, decoded; its orientation is not yet applied. A side longer than `longest_px` is reduced to it
    before any conversion, to save memory. Raises UnreadableImageError, and OSError when the machine fails."""
    register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=FORMATS)
            if min(image.size) < 1:
                raise UnreadableImageError("broken: it has no pixels")
            scale = max(image.size) / longest_px if longest_px else 1
            if scale > 1:
                image.draft(None, tuple(max(1, int(side / scale)) for side in image.size))
            image.load()
            image = shrunk(image, longest_px) if scale > 1 else image
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"enormous: more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels") from None
    except PermissionError:
        raise UnreadableImageError("cannot be read: permission denied") from None
    except Image.UnidentifiedImageError:
        reason = "the file is empty" if path.stat().st_size == 0 else "not a picture, or damaged"
        raise UnreadableImageError(f"broken: {reason}") from None
    except Exception as error:  # decoders raise any error on damaged bytes
        if getattr(error, "errno", None) in OF_THE_MACHINE:
            raise
        raise UnreadableImageError(f"broken: {one_line(error)}") from None
    return image


def shrunk(image: Image.Image, longest_px: int) -> Image.Image:
    """Scale down to `longest_px`, after converting modes that cannot be averaged (palettes, 16 and 32 bits)."""
    turn = orientation(image)
    if is_deep(image):
        image = deep_grey(image)
    elif image.mode in ("1", "P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.getexif()[ExifTags.Base.Orientation] = turn
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: the picture itself is fine
        return 1


def is_rotated(image: Image.Image) -> bool:
    """Whether the EXIF orientation says that the pixels must be turned."""
    return orientation(image) in TURNS


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the upright picture: EXIF orientations from 5 on swap the sides."""
    turned = orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """The pixels turned upright. EXIF is dropped: encoding it again fails on damaged entries."""
    if not is_rotated(image):
        return image
    turned = image.transpose(TURNS[orientation(image)])
    turned.info = {key: image.info[key] for key in ("icc_profile", "transparency") if key in image.info}
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as upright RGB; transparent parts become white."""
    image = upright(image)
    if alpha_of(image, is_upright=True) is None:
        return to_srgb(image)
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(to_srgb(rgba.convert("RGB"), image.info.get("icc_profile")), mask=rgba.getchannel("A"))
    return white


def alpha_of(image: Image.Image, *, is_upright: bool = False) -> Image.Image | None:
    """The upright alpha channel as L; None when everything is opaque."""
    if image.mode not in ("RGBA", "LA", "La", "RGBa", "PA") and "transparency" not in image.info:
        return None
    image = image if is_upright else upright(image)
    try:
        alpha = image.convert("RGBA").getchannel("A")
    except ValueError:  # a mode without transparency, with a stray tag
        return None
    return None if alpha.getextrema()[0] >= OPAQUE_FROM else alpha


def to_srgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Any mode without transparency -> RGB, by the embedded profile if that fits."""
    profile = profile or image.info.get("icc_profile")
    if image.mode == "LAB":
        return by_profile(image, ImageCms.createProfile("LAB")) or image.convert("L").convert("RGB")
    if is_deep(image):
        return deep_grey(image).convert("RGB")
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if profile and (converted := by_profile(image, profile)) is not None:
        return converted
    return image.convert("RGB")


def by_profile(image: Image.Image, profile: bytes | ImageCms.core.CmsProfile) -> Image.Image | None:
    """Convert by an ICC profile; None when the profile is damaged or meant for another mode."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile) if isinstance(profile, bytes) else profile)
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB", intent)
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def deep_grey(image: Image.Image) -> Image.Image:
    """16- and 32-bit greys -> L. Integers up to 255 or 65535 keep that scale; fractions go from 0 to 1."""
    top = max(values.max(initial=0.0) for _, values in tiles(image))
    deep = image.mode.startswith("I;16") or (image.mode == "I" and top > 255)
    white = 65535.0 if deep else 255.0 if image.mode == "I" or top > 1 else 1.0
    grey = Image.new("L", image.size)
    for corner, values in tiles(image):
        shown = (values / max(white, top) * 255).clip(0, 255).round().astype(np.uint8)
        grey.paste(Image.fromarray(shown, mode="L"), corner)
    return grey


def tiles(image: Image.Image) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """((left, top), values) of all tiles of a 16- or 32-bit picture; NaN and infinity become 0."""
    for left, top in product(range(0, image.width, TILE_PX), range(0, image.height, TILE_PX)):
        box = (left, top, min(left + TILE_PX, image.width), min(top + TILE_PX, image.height))
        values = np.asarray(image.crop(box), dtype=np.float64)
        yield (left, top), np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Photo:
    """A usable photo. `size_px` is (h, w) upright. `mask_path` equals `path` if the transparency is the mask.

    Each exposure uses one of the `captions`; `is_captioned` if they are the photo's own. `bare_prompt` is the instance
    prompt if none of them is it, as some exposures then use it (`--instance_prompt_share`). `reasons` are remarks
    for the user (too small, …), none of which forbids its use. `subject` is the number of the run's subject, from 0.
    """

    path: Path
    size_px: tuple[int, int]
    captions: tuple[str, ...]
    mask_path: Path | None = None
    reasons: tuple[str, ...] = ()
    is_captioned: bool = False
    bare_prompt: str | None = None
    subject: int = 0

    @property
    def kept_name(self) -> str:
        """Name of files that a run folder keeps for it; those of further subjects are in `1/` and so on."""
        return f"{self.subject}/{self.path.name}" if self.subject else self.path.name

    def key(self, **made_by: str) -> str:
        """Of what is made for it: changes with the photo's content, and with the model and words that make it."""
        return content_key(photo=file_digest(self.path), **made_by)


def counts_of(photos: Iterable[Photo]) -> list[int]:
    """The number of photos of each subject."""
    return [count for _, count in sorted(Counter(photo.subject for photo in photos).items())]


def quoted(photo: Photo) -> str:
    """Its captions in quotes."""
    return " ".join(f"“{caption}”" for caption in photo.captions)


def open_again(path: Path) -> Image.Image:
    """A file that could be read before. Raises UserError when it cannot any more."""
    try:
        return open_image(path)
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error}; it changed since the folder was read.") from error


def open_rgb(photo: Photo) -> Image.Image:
    """The photo's pixels: RGB, upright, on white. Raises UserError when it cannot be read any more."""
    return to_rgb(open_again(photo.path))


def why_not_beside(photo: Photo, target: Path, photos: Sequence[Photo], *, replaces: bool = False) -> str:
    """Why no file `target` is made beside one of the photos: something has its name, or two photos would share it. ""
    when it can be made. With `replaces`, what is there was made before."""
    if target.exists() and not replaces:
        return f"{target.name} exists but cannot be used; it is kept"
    if sum(other.path.stem == photo.path.stem for other in photos) > 1:
        return f"another photo has the name {photo.path.stem} too: rename one of them"
    return ""
