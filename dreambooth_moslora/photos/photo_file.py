"""One photo: its file from any phone or program as upright sRGB pixels, its captions, its mask and
its crops.

Only this module handles orientation (EXIF), colour profiles, transparency (on white), CMYK, Lab,
palettes, greys and 16 bits. Sizes are (height, width) px of the upright picture. What training cuts
out is planned as numbers, then cut:

    photo (h, w) --resize: shorter side = r·zoom--> (h', w') --mirror?--> crop (r, r) at (top, left)

With `--enable_bucket` the crop is a rectangle of about the same area, whose shape is nearest to the
photo's. SDXL is conditioned on these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2).
"""

import errno
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps

from dreambooth_moslora.disk.contents import content_key, file_digest
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.settings import rows, table

FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")
"""Formats that are read as photos; none runs an interpreter (EPS) or fetches anything."""
# Suffixes of files that claim to be photos; any file of FORMATS is read, whatever its name
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp"}
    | {".heic", ".heif", ".hif", ".avif"}
    | {".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".jp2"}
)
# An alpha channel whose least value is this or more shows nothing through
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

OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
"""Errors of the machine, not of the picture, which may be readable next time."""


class UnreadableImageError(Exception):
    """The file cannot be read as a picture; the text says why, without the file's name."""


@cache
def register_heif() -> None:
    """Teach Pillow to read HEIF, the format of iPhones."""
    import pillow_heif

    pillow_heif.register_heif_opener()


def open_image(path: Path) -> Image.Image:
    """The first frame as stored. Raises UnreadableImageError; OSError by the machine."""
    register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=FORMATS)
            image.load()
            return image

    # Each reason in words for the person who chose the folder
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise UnreadableImageError(f"enormous: more than {most:.0f} megapixels") from None
    except PermissionError:
        raise UnreadableImageError("cannot be read: permission denied") from None
    except Image.UnidentifiedImageError:
        reason = "the file is empty" if path.stat().st_size == 0 else "not a picture, or damaged"
        raise UnreadableImageError(f"broken: {reason}") from None
    except Exception as error:  # decoders raise any error on damaged bytes
        if getattr(error, "errno", None) in OF_THE_MACHINE:
            raise
        raise UnreadableImageError(f"broken: {one_line(error)}") from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright."""
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
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    kept = ("icc_profile", "transparency")
    turned.info = {key: image.info[key] for key in kept if key in image.info}
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as upright RGB; transparent parts become white."""
    image = upright(image)
    if alpha_of(image) is None:
        return to_srgb(image)

    # The colours are converted without the alpha channel, which profiles do not know.
    rgba = image.convert("RGBA")
    colours = to_srgb(rgba.convert("RGB"), image.info.get("icc_profile"))
    white = Image.new("RGB", rgba.size, "white")
    white.paste(colours, mask=rgba.getchannel("A"))
    return white


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The upright alpha channel as L; None when everything is opaque."""
    if image.mode not in ("RGBA", "LA", "La", "RGBa", "PA") and "transparency" not in image.info:
        return None
    try:
        alpha = upright(image).convert("RGBA").getchannel("A")
    except ValueError:  # a mode without transparency, with a stray tag
        return None
    return None if alpha.getextrema()[0] >= OPAQUE_FROM else alpha


def to_srgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Any mode without transparency -> RGB, by the embedded profile if that fits."""
    profile = profile or image.info.get("icc_profile")

    # Modes that a profile of the file does not describe
    if image.mode == "LAB":
        converted = by_profile(image, ImageCms.createProfile("LAB"))
        return converted or image.convert("L").convert("RGB")
    if is_deep(image):
        return deep_grey(image).convert("RGB")

    # Palettes and the rest become RGB first: profiles are written for these three modes.
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    converted = by_profile(image, profile) if profile else None
    return converted or image.convert("RGB")


def by_profile(image: Image.Image, profile: bytes | ImageCms.core.CmsProfile) -> Image.Image | None:
    """Convert by an ICC profile; None when the profile is damaged or meant for another mode."""
    try:
        file = BytesIO(profile) if isinstance(profile, bytes) else profile
        transform = ImageCms.buildTransform(
            inputProfile=ImageCms.ImageCmsProfile(file),
            outputProfile=ImageCms.createProfile("sRGB"),
            inMode=image.mode,
            outMode="RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def is_deep(image: Image.Image) -> bool:
    """Whether its pixels have 16 or 32 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def deep_grey(image: Image.Image) -> Image.Image:
    """16- and 32-bit greys -> L. Integers up to 255 or 65535 keep that scale; fractions go from 0
    to 1."""
    # The file does not say which value is white. The largest value tells.
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    top = values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and top > 255):
        white = 65535.0
    elif image.mode == "I" or top > 1:
        white = 255.0
    else:
        white = 1.0

    shown = (values / max(white, top) * 255).clip(0, 255).round()
    return Image.fromarray(shown.astype(np.uint8))


@dataclass(frozen=True)
class Photo:
    """A usable photo of a folder, with what lies beside it."""

    path: Path
    size_px: tuple[int, int]  # (h, w) upright
    captions: tuple[str, ...]  # each exposure uses one
    mask_path: Path | None = None  # `path` if the transparency is the mask
    reasons: tuple[str, ...] = ()  # remarks for the user; none forbids its use
    is_captioned: bool = False  # the captions are its own
    # the instance prompt, if no caption is it (`--instance_prompt_share`)
    bare_prompt: str | None = None
    subject: int = 0  # its number in the run, from 0

    @property
    def kept_name(self) -> str:
        """Name of files that a run folder keeps for it; those of further subjects are in `1/` and
        so on."""
        return f"{self.subject}/{self.path.name}" if self.subject else self.path.name

    @property
    def has_mask_file(self) -> bool:
        """Whether the mask is a file, not the photo's own transparency."""
        return self.mask_path not in (None, self.path)

    def key(self, **made_by: str) -> str:
        """A key of what is made for the photo. It changes with the photo's content, and with the
        model and words that make it."""
        return content_key(photo=file_digest(self.path), **made_by)


def counts_of(photos: Iterable[Photo]) -> list[int]:
    """How many photos each subject has, in the order of the subjects."""
    counts = Counter(photo.subject for photo in photos)
    return [counts[subject] for subject in sorted(counts)]


def quoted(photo: Photo) -> str:
    """The photo's captions in quotation marks."""
    return " or ".join(f"“{caption}”" for caption in photo.captions)


def open_again(path: Path) -> Image.Image:
    """A file that could be read before. Raises UserError when it cannot any more."""
    try:
        return open_image(path)
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error}; it changed since the folder was read.") from error


def open_rgb(photo: Photo) -> Image.Image:
    """The photo's pixels: RGB, upright, on white. Raises UserError when it cannot be read any
    more."""
    return to_rgb(open_again(photo.path))


def why_not_beside(photo: Photo, target: Path, photos: Sequence[Photo]) -> str:
    """Why `target` is not made beside a photo, or "": something has its name, or two photos would
    share it."""
    if target.exists():
        return f"{target.name} exists but cannot be used; it is kept"
    if sum(other.path.stem == photo.path.stem for other in photos) > 1:
        return f"another photo has the name {photo.path.stem} too: rename one of them"
    return ""


def find_mask(
    path: Path, photo: Image.Image, beside: Path | None, *, alpha_is_mask: bool
) -> tuple[Path | None, list[str]]:
    """The file that holds the photo's mask, or None, and remarks for the user.

    path: of the photo
    photo: as opened
    beside: the file that has a mask's name, if there is one
    alpha_is_mask: whether the opaque part of a transparent photo is its mask
    """
    reasons = []

    # What the user drew comes first.
    if beside and beside.is_file():
        problem = mask_problem(beside, upright_size(photo))
        if problem is None:
            return beside, reasons
        reasons.append(f"mask not used: {problem}")

    # Then a photo that was cut out
    transparent = alpha_of(photo)
    if transparent is None:
        return None, reasons
    if transparent.getextrema()[1] == 0:
        return None, [*reasons, "entirely transparent: it is a white square"]
    if alpha_is_mask:
        return path, [*reasons, "transparent: on white, its opaque part is the mask"]
    return None, [*reasons, "transparent: on white"]


def mask_problem(path: Path, photo_px: tuple[int, int]) -> str | None:
    """Why a mask file cannot be used with a photo of this (height, width), or None."""
    try:
        mask = grey_mask(open_image(path))
    except UnreadableImageError as error:
        return str(error)

    # Its size may be another one, but its shape must be the photo's, within 2 % for rounding.
    height, width = photo_px
    if abs(mask.width / mask.height - width / height) > 0.02 * width / height:
        shape = f"its shape {mask.width} x {mask.height}"
        return f"{shape} is not that of the photo, {width} x {height}"
    return "it is black everywhere" if mask.getextrema()[1] == 0 else None


def grey_mask(image: Image.Image) -> Image.Image:
    """The mask as L, white on the subject: the brightness, or else the opacity, with a maximum of
    255."""
    alpha = alpha_of(image)
    if alpha is None:
        grey = to_rgb(image).convert("L")
    else:
        # A picture that is black where it is opaque was drawn with its transparency alone.
        brightness = upright(image).convert("LA").getchannel("L")
        seen = ImageChops.multiply(brightness, alpha)
        grey = alpha if seen.getextrema()[1] == 0 else seen

    # Some programs write 0 and 1 in place of 0 and 255.
    brightest = max(grey.getextrema()[1], 1)
    return grey.point([min(255, round(255 * value / brightest)) for value in range(256)])


def open_mask(photo: Photo) -> Image.Image | None:
    """L, 255 on the subject and 0 elsewhere; None without a mask. Raises UserError."""
    if photo.mask_path is None:
        return None
    image = open_again(photo.mask_path)
    return alpha_of(image) if photo.mask_path == photo.path else grey_mask(image)


def kept_path(photo: Photo, folder: Path) -> Path:
    """The photo's mask in `folder`; `dog.jpg` and `dog.png` have different ones."""
    return folder / f"{photo.kept_name}.mask.png"


def with_kept_masks(photos: Iterable[Photo], folder: Path) -> list[Photo]:
    """The photos; those without a mask of their own get the one that training made, if it is there
    and fits."""
    found = []
    for photo in photos:
        path = kept_path(photo, folder)
        photo = without_kept_mask(photo, folder)
        if photo.mask_path is None and path.is_file() and not mask_problem(path, photo.size_px):
            photo = replace(photo, mask_path=path)
        found.append(photo)
    return found


def without_kept_mask(photo: Photo, folder: Path) -> Photo:
    """The photo, without its mask if training made that."""
    return replace(photo, mask_path=None) if photo.mask_path == kept_path(photo, folder) else photo


# `--image_interpolation_mode` -> Pillow's filter
FILTERS = {name.lower(): kind for name, kind in Image.Resampling.__members__.items()}
FILTERS |= {"nearest_exact": Image.Resampling.NEAREST}


@dataclass(frozen=True)
class CropPlan:
    """One crop of a photo, as numbers."""

    original_size: tuple[int, int]  # (h, w) px of the upright photo
    resized: tuple[int, int]  # after scaling
    crop_top_left: tuple[int, int]  # (y, x) in the resized and mirrored photo
    target_size: tuple[int, int]  # (h, w) of the crop
    flip: bool

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's size and crop conditioning: original height, width, crop top, left, target height,
        width; px."""
        return *self.original_size, *self.crop_top_left, *self.target_size

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop in the photo, which is not mirrored, shown at
        (width, height)."""
        crop_height, crop_width = self.target_size
        whole_height, whole_width = self.resized
        top, left = self.crop_top_left

        # The plan counts from the left of the mirrored photo.
        if self.flip:
            left = whole_width - crop_width - left

        # From px of the resized photo to px of the shown one
        across = width / whole_width
        down = height / whole_height
        right = left + crop_width
        bottom = top + crop_height
        return left * across, top * down, right * across, bottom * down


def resized_size(size_px: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the photo scaled to the smallest size that covers `target` (h, w)."""
    height, width = size_px
    least_height, least_width = target
    if least_height * width >= least_width * height:
        return least_height, max(least_width, width * least_height // height)
    return max(least_height, height * least_width // width), least_width


def bucket_of(size_px: tuple[int, int], resolution_px: int, step_px: int) -> tuple[int, int]:
    """(h, w), multiples of `step_px`, of at most the square's area, with the shape nearest to
    `size_px`'s."""
    # All rectangles with sides from half the resolution to twice, as wide as the area allows
    shapes: set[tuple[int, int]] = set()
    shortest = step_px * math.ceil(resolution_px / 2 / step_px)
    longest = 2 * resolution_px
    for side in range(shortest, longest + 1, step_px):
        other = min(resolution_px**2 // side, longest) // step_px * step_px
        if other:
            shapes |= {(side, other), (other, side)}

    # The nearest shape; of equally near ones the largest
    ratio = size_px[0] / size_px[1]

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        height, width = shape
        return round(abs(math.log(height / width / ratio)), 6), -height * width

    return min(sorted(shapes), key=distance)


def nearest_shape(size_px: tuple[int, int], shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Of `shapes` (h, w), the one nearest to that of `size_px` (h, w)."""
    ratio = size_px[0] / size_px[1]
    return min(sorted(shapes), key=lambda shape: abs(math.log(shape[0] / shape[1] / ratio)))


@dataclass(frozen=True)
class CropRule:
    """How training cuts photos."""

    resolution_px: int  # side of the square
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    crops_per_photo: int | None = 1  # different ones; None: always new ones
    zoom: float = 1.0  # most, at random, within a photo's own pixels
    bucket_step_px: int | None = None  # to the rectangle of `bucket_of` instead
    # (h, w), of which a photo gets the one nearest to its shape
    sizes: tuple[tuple[int, int], ...] = ()

    def target(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the crops of a photo of `size_px` (h, w)."""
        # As diffusers' scripts choose: of two equally near sizes the later
        if self.sizes:
            height, width = size_px
            return min(reversed(self.sizes), key=lambda s: abs(height * s[1] - width * s[0]))
        if self.bucket_step_px is None:
            return self.resolution_px, self.resolution_px
        return bucket_of(size_px, self.resolution_px, self.bucket_step_px)

    def plan(
        self, size_px: tuple[int, int], rng: Random, target: tuple[int, int] | None = None
    ) -> CropPlan:
        """Where to cut `target` (h, w), else the rule's own, out of a photo of `size_px` (h, w).
        Draws four numbers."""
        # Always all four, so that a setting does not move the draws of the others
        flip = rng.random()
        down = rng.random()
        right = rng.random()
        closer = rng.random()

        # The zoom, bounded by the photo's own pixels: enlarging would only blur
        target_height, target_width = target = target or self.target(size_px)
        side = min(target)
        own = min(size_px[0] * side // target_height, size_px[1] * side // target_width)
        zoomed = round(side * (1 + (self.zoom - 1) * closer))
        shorter = max(side, min(zoomed, own))

        # The smallest resized photo that covers the zoomed target
        covered = (target_height * shorter // side, target_width * shorter // side)
        height, width = resized_size(size_px, covered)

        # The place of the crop in it
        if self.center_crop:
            top = (height - target_height) // 2
            left = (width - target_width) // 2
        else:
            top = int(down * (height - target_height + 1))
            left = int(right * (width - target_width + 1))
        return CropPlan(
            original_size=size_px,
            resized=(height, width),
            crop_top_left=(top, left),
            target_size=target,
            flip=self.random_flip and flip < 0.5,
        )


def crop_rule(config: table.TrainConfig) -> CropRule:
    """The rule that these settings describe."""
    step_px = config.bucket_reso_steps or (64 if config.resolution > 256 else 8)
    return CropRule(
        resolution_px=config.resolution,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        interpolation=config.image_interpolation_mode,
        # Without a cache each exposure is encoded anew, so it may as well be a new crop.
        crops_per_photo=None if config.caching == "off" else config.crops_per_photo,
        zoom=config.crop_zoom,
        bucket_step_px=step_px if config.enable_bucket else None,
        sizes=rows.parse_sizes(config.aspect_ratio_buckets),
    )


def apply_crop(image: Image.Image, plan: CropPlan, interpolation: str = "lanczos") -> Image.Image:
    """The crop, of `target_size`, of the photo or its mask at any scale. Only the crop is
    resampled."""
    left, top, right, bottom = plan.box(image.width, image.height)
    box = (left, top, min(right, image.width), min(bottom, image.height))
    crop = image.resize(plan.target_size[::-1], FILTERS[interpolation], box=box)
    return ImageOps.mirror(crop) if plan.flip else crop
