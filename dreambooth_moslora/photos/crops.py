"""What training cuts out of a photo, first as numbers and then as pixels, and the checks of a folder's pixels.

    photo (h, w) --resize: shorter side = r·zoom--> (h', w') --mirror?--> crop (r, r) at (top, left)

With `--enable_bucket` the crop is a rectangle of about the same area, whose shape is nearest to the photo's. SDXL is
conditioned on these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2).

`examine` finds blurred photos and nearly equal pairs. Sharpness compares second differences with first ones at edges:
√mean L² / √mean |∇|², over tiles. It measures how steep edges are, not how many there are, so a plain background is
fine. The sharpest tenth of the edges decides, so a blurred background is fine too. Real photos have 1.8 to 3.2; blurred
by a Gaussian of 3 px at 1024 px they have 0.5 to 0.8. Likeness is the correlation of 16 × 16 thumbnails: different
photos of one subject have up to 0.8; a copy that is cropped by a few percent, brighter or smaller has 0.93 to 1.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from dreambooth_moslora.core import rng
from dreambooth_moslora.photos.folder import PhotoReport
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.pictures import Row
from dreambooth_moslora.settings.subjects import stream_of
from dreambooth_moslora.settings.table import TrainConfig

FILTERS = {name.lower(): kind for name, kind in Image.Resampling.__members__.items()}
FILTERS["nearest_exact"] = Image.Resampling.NEAREST
FRAME_COLOUR = (232, 64, 44)
SHOWN_PX = 384
MAX_CROPS = 5
MIN_SHARPNESS = 0.85
MAX_LIKENESS = 0.92
LOOK_PX, MIN_LOOK_PX = 512, 128
TILE_PX = 16
THUMBNAIL_PX = 16
EDGE_PERCENTILE, SHARPEST_PERCENTILE = 80, 90


@dataclass(frozen=True)
class CropPlan:
    """`original_size` (h, w) of the upright photo, `resized` (h, w) after scaling, `crop_top_left` (y, x) in
    the resized and mirrored photo, `target_size` (h, w) of the crop; all in px."""

    original_size: tuple[int, int]
    resized: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    flip: bool

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's size and crop conditioning: original height, width, crop top, left, target height, width; px."""
        return *self.original_size, *self.crop_top_left, *self.target_size

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop in the photo, which is not mirrored, shown at (width, height)."""
        (crop_height, crop_width), (whole_height, whole_width) = self.target_size, self.resized
        top, left = self.crop_top_left
        left = whole_width - crop_width - left if self.flip else left
        across, down = width / whole_width, height / whole_height
        return left * across, top * down, (left + crop_width) * across, (top + crop_height) * down


def resized_size(size_px: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the photo scaled to the smallest size that covers `target` (h, w)."""
    (height, width), (least_height, least_width) = size_px, target
    if least_height * width >= least_width * height:
        return least_height, max(least_width, width * least_height // height)
    return max(least_height, height * least_width // width), least_width


def bucket_of(size_px: tuple[int, int], resolution_px: int, step_px: int) -> tuple[int, int]:
    """(h, w), multiples of `step_px`, with at most the square's area, and the shape nearest to that of `size_px`. The
    sides are between half and twice `resolution_px`. Of two equally near shapes the larger one is taken."""
    sides = range(step_px * math.ceil(resolution_px / 2 / step_px), 2 * resolution_px + 1, step_px)
    shapes: set[tuple[int, int]] = set()
    for side in sides:
        other = min(resolution_px**2 // side, 2 * resolution_px) // step_px * step_px
        if other:
            shapes |= {(side, other), (other, side)}
    ratio = size_px[0] / size_px[1]
    return min(sorted(shapes), key=lambda s: (round(abs(math.log(s[0] / s[1] / ratio)), 6), -s[0] * s[1]))


def nearest_shape(size_px: tuple[int, int], shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Of `shapes` (h, w), the one nearest to that of `size_px` (h, w)."""
    ratio = size_px[0] / size_px[1]
    return min(sorted(shapes), key=lambda shape: abs(math.log(shape[0] / shape[1] / ratio)))


@dataclass(frozen=True)
class CropRule:
    """How photos are cut: to a square of `resolution_px`, or with `bucket_step_px` to the rectangle of `bucket_of`, in
    `crops_per_photo` different crops (None: always new ones). Each photo is enlarged by a random factor, of at most
    `zoom` and not beyond its own pixels."""

    resolution_px: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    crops_per_photo: int | None = 1
    zoom: float = 1.0
    bucket_step_px: int | None = None

    def target(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the crops of a photo of `size_px` (h, w)."""
        if self.bucket_step_px is None:
            return self.resolution_px, self.resolution_px
        return bucket_of(size_px, self.resolution_px, self.bucket_step_px)

    def plan(self, size_px: tuple[int, int], rng: Random, target: tuple[int, int] | None = None) -> CropPlan:
        """Where to cut `target` (h, w), else the rule's own, out of a photo of `size_px` (h, w). Draws four numbers."""
        flip, down, right, closer = rng.random(), rng.random(), rng.random(), rng.random()
        target = target or self.target(size_px)
        side = min(target)
        own = min(size_px[0] * side // target[0], size_px[1] * side // target[1])
        shorter = max(side, min(round(side * (1 + (self.zoom - 1) * closer)), own))
        height, width = resized_size(size_px, (target[0] * shorter // side, target[1] * shorter // side))
        if self.center_crop:
            top, left = (height - target[0]) // 2, (width - target[1]) // 2
        else:
            top, left = int(down * (height - target[0] + 1)), int(right * (width - target[1] + 1))
        return CropPlan(size_px, (height, width), (top, left), target, self.random_flip and flip < 0.5)


def crop_rule(config: TrainConfig) -> CropRule:
    """The rule that these settings describe."""
    crops = None if config.caching == "off" else config.crops_per_photo
    step_px = config.bucket_reso_steps or (64 if config.resolution > 256 else 8)
    drawing = (config.center_crop, config.random_flip, config.image_interpolation_mode, crops, config.crop_zoom)
    return CropRule(config.resolution, *drawing, step_px if config.enable_bucket else None)


def apply_crop(image: Image.Image, plan: CropPlan, interpolation: str = "lanczos") -> Image.Image:
    """The crop of `image`, of `target_size`. `image` is the photo or its mask, at any scale. Only the crop is
    resampled, which differs from resizing the whole image first by a filter's width at the border."""
    left, top, right, bottom = plan.box(image.width, image.height)
    box = (left, top, min(right, image.width), min(bottom, image.height))
    crop = image.resize(plan.target_size[::-1], FILTERS[interpolation], box=box)
    return ImageOps.mirror(crop) if plan.flip else crop


def plans_of(photo: Photo, number: int, config: TrainConfig) -> Iterator[CropPlan]:
    """The crops of photo `number` of its subject, with the random draws of training; without a seed those of seed 0."""
    rule, stream = crop_rule(config), stream_of("instance", photo.subject)
    for slot in range(number * config.repeats, (number + 1) * config.repeats):
        for crop in range(config.crops_per_photo):
            yield rule.plan(photo.size_px, rng(config.seed or 0, stream, "crop", slot, crop))


def crop_rows(photos: list[Photo], config: TrainConfig) -> list[Row]:
    """One row per photo: the photo with frames, then up to five crops; parts outside the mask are dark."""
    rows = []
    for number, photo in enumerate(photos):
        shown = masked(open_rgb(photo), open_mask(photo))
        plans = list(islice(plans_of(photo, number, config), MAX_CROPS))
        crops = [apply_crop(shown, plan, config.image_interpolation_mode) for plan in plans]
        crops = [ImageOps.pad(crop, (SHOWN_PX, SHOWN_PX), color="white") for crop in crops]
        title = "; ".join([photo.path.name, *photo.reasons])
        scale = SHOWN_PX / max(shown.size)
        framed = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))))
        draw = ImageDraw.Draw(framed)
        for plan in plans:
            left, top, right, bottom = plan.box(*framed.size)
            frame = (left, top, max(left, right - 1), max(top, bottom - 1))
            draw.rectangle(frame, outline=FRAME_COLOUR, width=3)
        framed = ImageOps.pad(framed, (SHOWN_PX, SHOWN_PX), color="white")
        rows.append(Row(title.encode("ascii", "replace").decode(), [framed, *crops]))
    return rows


def masked(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """The image, with parts outside the mask at a third of their brightness."""
    if mask is None:
        return image
    dark = image.point(lambda value: value // 3)
    return Image.composite(image, dark, mask.resize(image.size))


BLURRED = "blurred"


def examine(report: PhotoReport, resolution_px: int = LOOK_PX) -> PhotoReport:
    """The report with "blurred" and "near-duplicate" in the reasons, as seen at the size of training. Of a sharp photo
    and a blurred copy, the copy is the duplicate, whatever their order."""
    look_px = min(LOOK_PX, max(MIN_LOOK_PX, resolution_px))
    photos, thumbnails = [], []
    for photo in report.photos:
        image, reasons = open_rgb(photo), []
        if (sharp := sharpness(image, look_px)) < MIN_SHARPNESS:
            reasons.append(f"{BLURRED}: sharpness {sharp:.2f}, sharp photos have {MIN_SHARPNESS} and more")
        small = thumbnail(image)
        likenesses = [float(small @ earlier) for earlier in thumbnails]
        if likenesses and max(likenesses) > MAX_LIKENESS:
            place = likenesses.index(max(likenesses))
            twin = photos[place]
            if not reasons and any(reason.startswith(BLURRED) for reason in twin.reasons):  # the sharp one stays
                photos[place] = replace(twin, reasons=(*twin.reasons, f"near-duplicate of {photo.path.name}"))
            else:
                reasons.append(f"near-duplicate of {twin.path.name}")
        thumbnails.append(small)
        photos.append(replace(photo, reasons=(*photo.reasons, *reasons)))
    return replace(report, photos=photos)


def sharpness(image: Image.Image, look_px: int = LOOK_PX) -> float:
    """Steepness of the sharpest edges of an RGB picture, scaled to `look_px`; 0 when it has no edges."""
    scale = look_px / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    if min(grey.shape) < TILE_PX + 2:
        return MIN_SHARPNESS  # too few pixels to tell
    inner = grey[1:-1, 1:-1]
    up, down, left, right = grey[:-2, 1:-1], grey[2:, 1:-1], grey[1:-1, :-2], grey[1:-1, 2:]
    second = tile_energy((4 * inner - up - down - left - right) ** 2)
    first = tile_energy(((right - left) ** 2 + (down - up) ** 2) / 4)
    edges = first >= np.percentile(first, EDGE_PERCENTILE)
    return float(np.percentile((second / (first + 1))[edges], SHARPEST_PERCENTILE))


def tile_energy(squares: np.ndarray) -> np.ndarray:
    """(h, w) -> (h // 16, w // 16): root mean square of each tile."""
    rows, columns = (side // TILE_PX for side in squares.shape)
    tiles = squares[: rows * TILE_PX, : columns * TILE_PX].reshape(rows, TILE_PX, columns, TILE_PX)
    return np.sqrt(tiles.mean((1, 3)))


def thumbnail(image: Image.Image) -> np.ndarray:
    """Colours at 16 × 16 as a vector (768,) with mean 0 and length 1; zeros for a single flat colour."""
    small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX, reducing_gap=3.0)
    values = np.asarray(small, dtype=np.float32).ravel()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 1e-3 else values * 0
