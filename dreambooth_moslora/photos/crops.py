"""The square that training cuts out of a photo: first as numbers (`CropPlan`), then as pixels.

    photo (h, w) --resize: shorter side = r·zoom--> (h', w') --mirror?--> crop (r, r) at (top, left)

With `--enable_bucket` it is a rectangle of about the same area, whose shape is nearest to the photo's. SDXL is
conditioned on these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageOps

from dreambooth_moslora.core.config.train_config import TrainConfig

__all__ = [
    "CropPlan",
    "CropRule",
    "apply_crop",
    "bucket_of",
    "crop_rule",
    "nearest_shape",
    "plan_crop",
    "resized_size",
]

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
}


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


def resized_size(size_px: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the photo scaled to the smallest size that covers `target` (h, w)."""
    (height, width), (least_height, least_width) = size_px, target
    if least_height * width >= least_width * height:
        return least_height, max(least_width, width * least_height // height)
    return max(least_height, height * least_width // width), least_width


def bucket_of(size_px: tuple[int, int], resolution_px: int, step_px: int) -> tuple[int, int]:
    """(h, w), multiples of `step_px`, with at most the square's area, and the shape nearest to that of `size_px`.

    The sides are between half and twice `resolution_px`. Of two equally near shapes the larger one is taken.
    """
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


def plan_crop(
    size_px: tuple[int, int],
    target: tuple[int, int],
    rng: Random,
    *,
    center_crop: bool = False,
    random_flip: bool = False,
    zoom: float = 1.0,
) -> CropPlan:
    """Where to cut `target` (h, w) out of a photo of `size_px` (h, w). It always draws four random numbers,
    whatever the flags.

    `zoom` >= 1: the photo is enlarged by a factor drawn from [1, zoom], but never beyond its own pixels.
    """
    flip, down, right, closer = rng.random(), rng.random(), rng.random(), rng.random()
    side, shorter = min(target), zoomed_side(size_px, target, 1 + (zoom - 1) * closer)
    height, width = resized_size(size_px, (target[0] * shorter // side, target[1] * shorter // side))
    if center_crop:
        top, left = (height - target[0]) // 2, (width - target[1]) // 2
    else:
        top, left = int(down * (height - target[0] + 1)), int(right * (width - target[1] + 1))
    return CropPlan(size_px, (height, width), (top, left), target, random_flip and flip < 0.5)


def zoomed_side(size_px: tuple[int, int], target: tuple[int, int], times: float) -> int:
    """The shorter side of `target` times `times`, but not beyond the photo's own pixels."""
    side = min(target)
    own = min(size_px[0] * side // target[0], size_px[1] * side // target[1])
    return max(side, min(round(side * times), own))


@dataclass(frozen=True)
class CropRule:
    """How photos are cut: to a square of `resolution_px`, in `crops_per_photo` different crops (None: always
    new ones), each enlarged by a random factor from 1 to `zoom`.

    With `bucket_step_px`, to the rectangle of `bucket_of` instead of the square.
    """

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
        """Where to cut `target` (h, w), by default the rule's own, out of a photo of `size_px` (h, w)."""
        flags = {"center_crop": self.center_crop, "random_flip": self.random_flip, "zoom": self.zoom}
        return plan_crop(size_px, target or self.target(size_px), rng, **flags)


def bucket_step(config: TrainConfig) -> int:
    """The sides of rectangles are multiples of this, px."""
    return config.bucket_reso_steps or (64 if config.resolution > 256 else 8)


def crop_rule(config: TrainConfig) -> CropRule:
    """The rule that these settings describe."""
    return CropRule(
        config.resolution,
        config.center_crop,
        config.random_flip,
        config.image_interpolation_mode,
        None if config.caching == "off" else config.crops_per_photo,
        config.crop_zoom,
        bucket_step(config) if config.enable_bucket else None,
    )


def apply_crop(image: Image.Image, plan: CropPlan, interpolation: str = "lanczos") -> Image.Image:
    """The crop of `image`, of `target_size`. `image` is the photo or its mask, at any scale.

    Only the crop is resampled. Resizing the whole image first would give the same inside, and differ by a
    filter's width at the border.
    """
    (height, width), (whole_height, whole_width) = plan.target_size, plan.resized
    top, left = plan.crop_top_left
    left = whole_width - width - left if plan.flip else left
    down, across = image.height / whole_height, image.width / whole_width
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    crop = image.resize((width, height), FILTERS[interpolation], box=box)
    return ImageOps.mirror(crop) if plan.flip else crop
