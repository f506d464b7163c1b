"""Open one photo, from any phone or program, as upright sRGB pixels with its captions and mask.

Only this module handles orientation (EXIF), colour profiles, transparency (on white), CMYK,
palettes and greys. Sizes are (height, width) px of the upright image.
"""

import errno
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, ImageChops, ImageCms

from dreambooth_moslora.disk.contents import hash_file, hash_values
from dreambooth_moslora.errors import UserError, format_error

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")
"""Formats that are read as photos; none runs an interpreter (EPS) or fetches anything."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp"}
    | {".heic", ".heif", ".hif", ".avif"}
    | {".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".jp2"}
)
"""Suffixes of files that are reported as photos. Any file of `IMAGE_FORMATS` is read, whatever its
name."""
MIN_OPAQUE_ALPHA = 250
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the image upright."""

MACHINE_ERRORS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
"""Errors of the machine, not of the image, which may be readable next time."""


class UnreadableImageError(Exception):
    """Error for a file that cannot be read as an image; its text says why, without the file's
    name."""


@cache
def register_heif() -> None:
    """Teach Pillow to read HEIF, the format of iPhones."""
    import pillow_heif

    pillow_heif.register_heif_opener()


def open_image(path: Path) -> Image.Image:
    """Return the first frame as stored. Raises UnreadableImageError; OSError for errors of the
    machine."""
    register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=IMAGE_FORMATS)
            image.load()

    # A reason for the person who chose the folder
    except Image.DecompressionBombError:
        max_megapixels = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise UnreadableImageError(f"enormous: more than {max_megapixels:.0f} megapixels") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImageError("broken: not a picture, or damaged") from None
    except Exception as error:  # decoders raise any error on damaged bytes
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        raise UnreadableImageError(f"broken: {format_error(error)}") from None

    # Lab, and greys of 16 and 32 bits, whose white no file tells
    if image.mode == "LAB" or image.mode.startswith(("I", "F")):
        raise UnreadableImageError(f"colours of the mode {image.mode}: save it as RGB with 8 bits")
    return image


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: the picture itself is fine
        return 1


def get_upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) of the upright image: EXIF orientations from 5 on swap the sides."""
    has_swapped_sides = read_orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if has_swapped_sides else (image.height, image.width)


def rotate_upright(image: Image.Image) -> Image.Image:
    """Return the upright pixels. EXIF is dropped: encoding it again fails on damaged entries."""
    transpose = ORIENTATION_TRANSPOSES.get(read_orientation(image))
    if transpose is None:
        return image
    upright = image.transpose(transpose)
    upright.info = {
        key: image.info[key] for key in ("icc_profile", "transparency") if key in image.info
    }
    return upright


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as upright RGB; transparent parts become white."""
    image = rotate_upright(image)
    if get_alpha(image) is None:
        return to_srgb(image)

    # The colours are converted without the alpha channel, which profiles do not know.
    rgba = image.convert("RGBA")
    colours = to_srgb(rgba.convert("RGB"), image.info.get("icc_profile"))
    white = Image.new("RGB", rgba.size, "white")
    white.paste(colours, mask=rgba.getchannel("A"))
    return white


def get_alpha(image: Image.Image) -> Image.Image | None:
    """Return the upright alpha channel as L; None when everything is opaque."""
    if image.mode not in ("RGBA", "LA", "La", "RGBa", "PA") and "transparency" not in image.info:
        return None
    try:
        alpha = rotate_upright(image).convert("RGBA").getchannel("A")
    except ValueError:  # a mode without transparency, with a stray tag
        return None
    return None if alpha.getextrema()[0] >= MIN_OPAQUE_ALPHA else alpha


def to_srgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Convert an image of any mode without transparency to RGB, by the embedded profile if that
    fits."""
    profile = profile or image.info.get("icc_profile")

    # Palettes and the rest become RGB first: profiles are written for these three modes.
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    converted = apply_profile(image, profile) if profile else None
    return converted or image.convert("RGB")


def apply_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert by an ICC profile; None when the profile is damaged or meant for another mode."""
    try:
        transform = ImageCms.buildTransform(
            inputProfile=ImageCms.ImageCmsProfile(BytesIO(profile)),
            outputProfile=ImageCms.createProfile("sRGB"),
            inMode=image.mode,
            outMode="RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Photo:
    """Usable photo of a folder, with its sidecars."""

    path: Path
    size_px: tuple[int, int]  # (h, w) upright
    captions: tuple[str, ...]  # each exposure uses one
    mask_path: Path | None = None  # `path` if the transparency is the mask
    # remarks for the user; none forbids its use. Faults are a `quality.Reason`
    reasons: tuple[str, ...] = ()
    is_captioned: bool = False  # by captions of its own
    # the instance prompt, if no caption is it (`--instance_prompt_share`)
    bare_prompt: str | None = None
    subject: int = 0  # its number in the run, from 0
    # of a person's face in the upright photo, left, top, right, bottom px (`faces`)
    face: tuple[float, float, float, float] | None = None
    made_by: str = ""  # the model that made it, with its licence (`synthetic`); "" of a real photo

    @property
    def run_file_name(self) -> str:
        """Return the name of the photo's files in a run folder; those of further subjects are in
        `1/` and so on."""
        return f"{self.subject}/{self.path.name}" if self.subject else self.path.name

    @property
    def has_mask_file(self) -> bool:
        """Return whether the mask is a file, not the photo's own transparency."""
        return self.mask_path not in (None, self.path)

    def compute_key(self, **maker: str) -> str:
        """Return a key of what is made for the photo. It changes with the photo's content, and with
        the model and words that make it."""
        return hash_values(photo=hash_file(self.path), **maker)


@dataclass(frozen=True)
class SkippedFile:
    """File of the folder that is not used."""

    path: Path
    reason: str
    is_photo: bool = False  # it was meant to be one
    size_px: tuple[int, int] | None = None  # None when unreadable


@dataclass(frozen=True)
class PhotoReport:
    """Photos, sidecars and skipped files of one folder, or of those of all subjects."""

    photos: list[Photo] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)  # captions and masks in use
    remarks: tuple[str, ...] = ()  # on all photos together (`quality.find_photo_faults`)


def count_photos(photos: Iterable[Photo]) -> list[int]:
    """Return the number of photos of each subject, in the order of the subjects."""
    counts = Counter(photo.subject for photo in photos)
    return [counts[subject] for subject in sorted(counts)]


def format_captions(photo: Photo) -> str:
    """Return the photo's captions in quotation marks."""
    return " or ".join(f"“{caption}”" for caption in photo.captions)


def require_image(path: Path) -> Image.Image:
    """Open a file that was read before. Raises UserError when it cannot be read any more."""
    try:
        return open_image(path)
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error}; it changed since the folder was read.") from error


def open_rgb(photo: Photo) -> Image.Image:
    """Return the photo's pixels: RGB, upright, on white. Raises UserError when it cannot be read
    any more."""
    return to_rgb(require_image(photo.path))


def explain_name_conflict(photo: Photo, target: Path, photos: Sequence[Photo]) -> str:
    """Return why `target` is not written beside a photo: it exists, or two photos would share it.
    "" without a conflict."""
    if target.exists():
        return f"{target.name} exists but cannot be used; it is kept"
    if sum(candidate.path.stem == photo.path.stem for candidate in photos) > 1:
        return f"another photo has the name {photo.path.stem} too: rename one of them"
    return ""


def find_mask(
    path: Path, photo: Image.Image, sidecar: Path | None, *, alpha_is_mask: bool
) -> tuple[Path | None, list[str]]:
    """Return the file that holds the photo's mask, or None, and remarks for the user.

    path: of the photo
    photo: as opened
    sidecar: the file that has a mask's name, if there is one
    alpha_is_mask: whether the opaque part of a transparent photo is its mask
    """
    reasons = []

    # A mask of the user comes first.
    if sidecar and sidecar.is_file():
        problem = explain_unusable_mask(sidecar, get_upright_size(photo))
        if problem is None:
            return sidecar, reasons
        reasons.append(f"mask not used: {problem}")

    # Then a photo that was cut out
    transparent = get_alpha(photo)
    if transparent is None:
        return None, reasons
    if transparent.getextrema()[1] == 0:
        return None, [*reasons, "entirely transparent: it is a white square"]
    if alpha_is_mask:
        return path, [*reasons, "transparent: on white, its opaque part is the mask"]
    return None, [*reasons, "transparent: on white"]


def explain_unusable_mask(path: Path, photo_px: tuple[int, int]) -> str | None:
    """Return why a mask file cannot be used with a photo of size (height, width), or None."""
    try:
        mask = to_grey_mask(open_image(path))
    except UnreadableImageError as error:
        return str(error)

    # Its size may be another one, but its shape must be the photo's, within 2 % for rounding.
    height, width = photo_px
    if abs(mask.width / mask.height - width / height) > 0.02 * width / height:
        return (
            f"its shape {mask.width} x {mask.height} is not that of the photo, {width} x {height}"
        )
    return "it is black everywhere" if mask.getextrema()[1] == 0 else None


def to_grey_mask(image: Image.Image) -> Image.Image:
    """Return the mask as L, white on the subject: the brightness, or else the opacity, with a
    maximum of 255."""
    alpha = get_alpha(image)
    if alpha is None:
        grey = to_rgb(image).convert("L")
    else:
        # An image that is black where it is opaque has its mask in the transparency alone.
        brightness = rotate_upright(image).convert("LA").getchannel("L")
        visible = ImageChops.multiply(brightness, alpha)
        grey = alpha if visible.getextrema()[1] == 0 else visible

    # Some programs write 0 and 1 in place of 0 and 255.
    brightest = max(grey.getextrema()[1], 1)
    return grey.point([min(255, round(255 * value / brightest)) for value in range(256)])


def open_mask(photo: Photo) -> Image.Image | None:
    """Return the mask as L, 255 on the subject and 0 elsewhere; None without a mask. Raises
    UserError."""
    if photo.mask_path is None:
        return None
    image = require_image(photo.mask_path)
    return get_alpha(image) if photo.mask_path == photo.path else to_grey_mask(image)


def get_saved_mask_path(photo: Photo, folder: Path) -> Path:
    """Return the path of the photo's mask in `folder`; `dog.jpg` and `dog.png` have different
    ones."""
    return folder / f"{photo.run_file_name}.mask.png"


def add_saved_masks(photos: Iterable[Photo], folder: Path) -> list[Photo]:
    """Return the photos; those without a mask of their own get the one that training saved in
    `folder`, if it exists and fits."""
    masked_photos = []
    for photo in photos:
        path = get_saved_mask_path(photo, folder)
        photo = drop_saved_mask(photo, folder)
        if (
            photo.mask_path is None
            and path.is_file()
            and not explain_unusable_mask(path, photo.size_px)
        ):
            photo = replace(photo, mask_path=path)
        masked_photos.append(photo)
    return masked_photos


def drop_saved_mask(photo: Photo, folder: Path) -> Photo:
    """Return the photo, without its mask if training made that."""
    return (
        replace(photo, mask_path=None)
        if photo.mask_path == get_saved_mask_path(photo, folder)
        else photo
    )
