"""What training cuts out of a photo: planned as numbers, then cut.

    photo (h, w) --resize: shorter side = r·zoom--> (h', w') --mirror?--> crop (r, r) at (top, left)

With `--enable_bucket` the crop is a rectangle of about the same area, whose shape is nearest to the
photo's. SDXL is conditioned on these numbers (Podell et al. 2023, arXiv 2307.01952, section 2.2).
Sizes are (height, width) px of the upright picture.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageOps

from dreambooth_moslora.settings import train_config

# (left, top, right, bottom) px of a face in the upright photo
Box = tuple[float, float, float, float]
# Of the crop's side, that a face fills in a near crop; that is every other one
NEAR_FACE_SHARE = 0.4
# Around a face, of its size: hair and chin
FACE_MARGIN = 0.4


@dataclass(frozen=True)
class CropPlan:
    """One crop of a photo, as numbers."""

    original_size: tuple[int, int]  # (h, w) px of the upright photo
    resized: tuple[int, int]  # after scaling
    crop_top_left: tuple[int, int]  # (y, x) in the resized and mirrored photo
    target_size: tuple[int, int]  # (h, w) of the crop
    is_mirrored: bool = False  # once it is cut

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's size and crop conditioning: original height, width, crop top, left, target height,
        width; px."""
        return *self.original_size, *self.crop_top_left, *self.target_size

    def get_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop in the photo, which is not mirrored, shown at
        (width, height)."""
        crop_height, crop_width = self.target_size
        whole_height, whole_width = self.resized
        top, left = self.crop_top_left

        # The plan counts from the left of the mirrored photo.
        if self.is_mirrored:
            left = whole_width - crop_width - left

        # From px of the resized photo to px of the shown one
        across = width / whole_width
        down = height / whole_height
        right = left + crop_width
        bottom = top + crop_height
        return left * across, top * down, right * across, bottom * down


def compute_resized_size(size_px: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the photo scaled to the smallest size that covers `target` (h, w)."""
    height, width = size_px
    least_height, least_width = target
    if least_height * width >= least_width * height:
        return least_height, max(least_width, width * least_height // height)
    return max(least_height, height * least_width // width), least_width


def choose_bucket(size_px: tuple[int, int], resolution_px: int, step_px: int) -> tuple[int, int]:
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


def find_nearest_shape(
    size_px: tuple[int, int], shapes: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Of `shapes` (h, w), the one nearest to that of `size_px` (h, w)."""
    ratio = size_px[0] / size_px[1]
    return min(sorted(shapes), key=lambda shape: abs(math.log(shape[0] / shape[1] / ratio)))


@dataclass(frozen=True)
class CropRule:
    """How training cuts photos."""

    resolution_px: int  # side of the square
    center_crop: bool = False
    random_flip: bool = False  # of which half are mirrored
    crops_per_photo: int | None = 1  # different ones; None: always new ones
    zoom: float = 1.0  # most, at random, within a photo's own pixels
    bucket_step_px: int | None = None  # to the rectangle of `choose_bucket` instead

    def get_target_size(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the crops of a photo of `size_px` (h, w)."""
        if self.bucket_step_px is None:
            return self.resolution_px, self.resolution_px
        return choose_bucket(size_px, self.resolution_px, self.bucket_step_px)

    def plan_crop(
        self,
        size_px: tuple[int, int],
        rng: Random,
        target: tuple[int, int] | None = None,
        face: Box | None = None,
    ) -> CropPlan:
        """Where to cut `target` (h, w), else the rule's own, out of a photo of `size_px` (h, w).
        Draws four numbers. Half of the crops come near the `face`, and none cuts it."""
        # Always all, so that a setting does not move the draws of the others.
        mirror = rng.random()
        down = rng.random()
        right = rng.random()
        closer = rng.random()

        # The zoom, bounded by the photo's own pixels: enlarging would only blur
        target_height, target_width = target = target or self.get_target_size(size_px)
        side = min(target)
        own = min(size_px[0] * side // target_height, size_px[1] * side // target_width)
        zoomed = round(side * (1 + (self.zoom - 1) * closer))
        if face is not None and closer >= 0.5:
            height = (face[3] - face[1]) / min(size_px)
            zoomed = max(zoomed, round(side * NEAR_FACE_SHARE / height))
        shorter = max(side, min(zoomed, own))

        # The smallest resized photo that covers the zoomed target
        covered = (target_height * shorter // side, target_width * shorter // side)
        height, width = compute_resized_size(size_px, covered)

        # The place of the crop in it: anywhere, or where the face is whole
        is_mirrored = self.random_flip and mirror < 0.5
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
            top = (height - target_height) // 2
            left = (width - target_width) // 2
        else:
            top = tops[0] + int(down * (tops[1] - tops[0] + 1))
            left = lefts[0] + int(right * (lefts[1] - lefts[0] + 1))
        return CropPlan(
            original_size=size_px,
            resized=(height, width),
            crop_top_left=(top, left),
            target_size=target,
            is_mirrored=is_mirrored,
        )


def compute_face_range(
    face: tuple[float, float], scale: float, target: int, whole: int
) -> tuple[int, int]:
    """The first and the last place, px, of a crop along one axis that holds a face.

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
    """The rule that these settings describe."""
    step_px = config.bucket_reso_steps or (64 if config.resolution > 256 else 8)
    return CropRule(
        resolution_px=config.resolution,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        # Without a cache each exposure is encoded anew, so it may as well be a new crop.
        crops_per_photo=None if config.caching == "off" else config.crops_per_photo,
        zoom=config.crop_zoom,
        bucket_step_px=step_px if config.enable_bucket else None,
    )


def apply_crop(
    image: Image.Image, plan: CropPlan, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The crop, of `target_size`, of the photo or its mask at any scale. Only the crop is
    resampled."""
    left, top, right, bottom = plan.get_box(image.width, image.height)
    box = (left, top, min(right, image.width), min(bottom, image.height))
    crop = image.resize(plan.target_size[::-1], resampling, box=box)
    return ImageOps.mirror(crop) if plan.is_mirrored else crop
