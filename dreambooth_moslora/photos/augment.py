"""Plan and cut the crops of a photo: size, position, mirroring and zoom.

    photo (h, w) --resize: shorter side = r·zoom--> (h', w') --mirror?--> crop (r, r) at (top, left)

With `--enable_bucket` the crop is a rectangle of about the same area, whose shape is nearest to the
photo's. SDXL is conditioned on these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2).
Sizes are (height, width) px of the upright image.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageOps

from dreambooth_moslora.settings import train_config

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) px of a face in the upright photo."""
NEAR_FACE_SHARE = 0.4
"""Share of the crop's side that a face fills in a near crop, which is every other one."""
FACE_MARGIN = 0.4
"""Margin around a face, as a share of its size: hair and chin."""


@dataclass(frozen=True)
class CropPlan:
    """One crop of a photo, as numbers."""

    original_size: tuple[int, int]  # (h, w) px of the upright photo
    resized: tuple[int, int]  # after scaling
    crop_top_left: tuple[int, int]  # (y, x) in the resized and mirrored photo
    target_size: tuple[int, int]  # (h, w) of the crop
    is_mirrored: bool = False  # after cropping

    @property
    def time_ids(self) -> tuple[int, ...]:
        """Return SDXL's size and crop conditioning: original height, width, crop top, left, target
        height, width; px."""
        return *self.original_size, *self.crop_top_left, *self.target_size

    def get_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) of the crop in the unmirrored photo scaled to (width,
        height)."""
        crop_height, crop_width = self.target_size
        whole_height, whole_width = self.resized
        crop_top, crop_left = self.crop_top_left

        # The plan counts from the left of the mirrored photo.
        if self.is_mirrored:
            crop_left = whole_width - crop_width - crop_left

        # From px of the resized photo to px of the shown one
        across, down = width / whole_width, height / whole_height
        return (
            crop_left * across,
            crop_top * down,
            (crop_left + crop_width) * across,
            (crop_top + crop_height) * down,
        )


def compute_resized_size(size_px: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return (h, w) of the photo scaled to the smallest size that covers `target` (h, w)."""
    height, width = size_px
    min_height, min_width = target
    if min_height * width >= min_width * height:
        return min_height, max(min_width, width * min_height // height)
    return max(min_height, height * min_width // width), min_width


def choose_bucket(size_px: tuple[int, int], resolution_px: int, step_px: int) -> tuple[int, int]:
    """Return the crop size (h, w) whose shape is nearest to that of `size_px`. Its sides are
    multiples of `step_px`, and its area is at most that of the square."""
    # All rectangles with sides from half the resolution to twice, as wide as the area allows
    shapes: set[tuple[int, int]] = set()
    shortest = step_px * math.ceil(resolution_px / 2 / step_px)
    longest = 2 * resolution_px
    for side in range(shortest, longest + 1, step_px):
        long_side = min(resolution_px**2 // side, longest) // step_px * step_px
        if long_side:
            shapes |= {(side, long_side), (long_side, side)}

    return find_nearest_shape(size_px, shapes)


def find_nearest_shape(
    size_px: tuple[int, int], shapes: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Return the shape (h, w) that is nearest to that of `size_px` (h, w); of equally near ones the
    largest."""
    ratio = size_px[0] / size_px[1]

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        height, width = shape
        return round(abs(math.log(height / width / ratio)), 6), -height * width

    return min(sorted(shapes), key=distance)


@dataclass(frozen=True)
class CropRule:
    """Rule by which training crops photos."""

    resolution_px: int  # side of the square, the largest if there are several
    center_crop: bool = False
    random_flip: bool = False  # mirrors half of the crops
    crops_per_photo: int | None = 1  # None: a new crop at each exposure
    zoom: float = 1.0  # maximum of the random zoom; it never enlarges a photo's pixels
    bucket_step_px: int | None = None  # for the rectangles of `choose_bucket`; None: squares
    more_resolutions_px: tuple[int, ...] = ()

    @property
    def resolution_count(self) -> int:
        return 1 + len(self.more_resolutions_px)

    def get_target_size(self, size_px: tuple[int, int], number: int = 0) -> tuple[int, int]:
        """Return (h, w) of the crops of a photo of `size_px` (h, w) in resolution `number`."""
        side_px = (self.resolution_px, *self.more_resolutions_px)[number]
        if self.bucket_step_px is None:
            return side_px, side_px
        return choose_bucket(size_px, side_px, self.bucket_step_px)

    def plan_crop(
        self,
        size_px: tuple[int, int],
        rng: Random,
        target: tuple[int, int] | None = None,
        face: Box | None = None,
    ) -> CropPlan:
        """Plan a crop of `target` (h, w), by default the rule's size, of a photo of `size_px` (h,
        w).

        Takes four random numbers from `rng`. No crop cuts the `face`, and half of them zoom in on
        it.
        """
        # Always take all four, so that a setting does not change the numbers of the others.
        mirror_draw, top_draw, left_draw, zoom_draw = (rng.random() for _ in range(4))

        # The zoom, bounded by the photo's own pixels: enlarging would only blur
        target_height, target_width = target = target or self.get_target_size(size_px)
        side = min(target)
        max_side = min(size_px[0] * side // target_height, size_px[1] * side // target_width)
        zoomed = round(side * (1 + (self.zoom - 1) * zoom_draw))
        if face is not None and zoom_draw >= 0.5:
            height = (face[3] - face[1]) / min(size_px)
            zoomed = max(zoomed, round(side * NEAR_FACE_SHARE / height))
        shorter = max(side, min(zoomed, max_side))

        # The smallest resized photo that covers the zoomed target
        covered = (target_height * shorter // side, target_width * shorter // side)
        height, width = compute_resized_size(size_px, covered)

        # The offset of the crop in it: anywhere, or where the face is whole
        is_mirrored = self.random_flip and mirror_draw < 0.5
        tops = (0, height - target_height)
        lefts = (0, width - target_width)
        if face is not None:
            tops = compute_face_range(face[1::2], height / size_px[0], target_height, height)
            lefts = compute_face_range(face[::2], width / size_px[1], target_width, width)
            # The plan counts from the left of the mirrored photo.
            if is_mirrored:
                first, last = lefts
                lefts = (width - target_width - last, width - target_width - first)
        if self.center_crop:
            crop_top = (height - target_height) // 2
            crop_left = (width - target_width) // 2
        else:
            crop_top = tops[0] + int(top_draw * (tops[1] - tops[0] + 1))
            crop_left = lefts[0] + int(left_draw * (lefts[1] - lefts[0] + 1))
        return CropPlan(
            original_size=size_px,
            resized=(height, width),
            crop_top_left=(crop_top, crop_left),
            target_size=target,
            is_mirrored=is_mirrored,
        )


def compute_face_range(
    face: tuple[float, float], scale: float, target: int, whole: int
) -> tuple[int, int]:
    """Return the first and the last offset, px, at which a crop holds the face, along one axis.

    face: its two ends in the photo, px
    scale: from the photo's px to those of the resized photo
    target, whole: sides of the crop and of the resized photo, px
    """
    near, far = face
    margin = FACE_MARGIN * (far - near)
    near = max(0, round((near - margin) * scale))
    far = min(whole, round((far + margin) * scale))

    # A face that is larger than the crop is met in its middle.
    if far - near > target:
        middle = (near + far - target) // 2
        near, far = middle, middle + target
    return max(0, far - target), min(whole - target, near)


def build_crop_rule(config: train_config.TrainConfig) -> CropRule:
    """Return the crop rule of these settings."""
    step_px = config.bucket_reso_steps or (64 if config.resolution > 256 else 8)
    return CropRule(
        resolution_px=config.resolution,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        # Without a cache each exposure is encoded anew, so it may as well be a new crop.
        crops_per_photo=None if config.caching == "off" else config.crops_per_photo,
        zoom=config.crop_zoom,
        bucket_step_px=step_px if config.enable_bucket else None,
        more_resolutions_px=config.resolutions[1:],
    )


def apply_crop(
    image: Image.Image, plan: CropPlan, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Return the crop, of `target_size`, of a photo or its mask at any scale.

    Only the crop is resampled.
    """
    x0, y0, x1, y1 = plan.get_box(image.width, image.height)
    box = (x0, y0, min(x1, image.width), min(y1, image.height))
    crop = image.resize(plan.target_size[::-1], resampling, box=box)
    return ImageOps.mirror(crop) if plan.is_mirrored else crop
