"""Examine the photos of a folder: blur, near-duplicates, equal backgrounds; and draw their crops.

Sharpness compares second differences with first ones at edges, √mean L² / √mean |∇|², over tiles;
the sharpest tenth decides, so that a plain or blurred background is fine. Real photos have 1.8 to
3.2; blurred by a Gaussian of 3 px at 1024 px they have 0.5 to 0.8. Likeness is the correlation of
the middles of 16 × 16 thumbnails, so that a head that turns before one wall is no copy: different
photos of one subject have up to 0.8; a copy that is cropped by a few percent, brighter or smaller
has 0.93 to 1. Backgrounds are compared by their colours, in what the middle leaves, or outside of
the masks: photos before one wall differ by up to 0.1, others by 0.11 and more.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from dreambooth_moslora.errors import escape_control_characters
from dreambooth_moslora.photos import augment, photo_file
from dreambooth_moslora.pictures import SheetRow
from dreambooth_moslora.seeds import seed_rng
from dreambooth_moslora.settings import subjects, train_config

logger = logging.getLogger(__name__)

FRAME_COLOUR = (232, 64, 44)
CELL_PX = 384
MAX_CROPS = 5
"""Of the sheet of training's crops."""
MIN_SHARPNESS = 0.85
MAX_LIKENESS = 0.92
"""Sharpness below which a photo is blurred; likeness above which two are near-duplicates."""
SHARPNESS_PX = 512
MIN_SHARPNESS_PX = 128
"""Shorter side at which sharpness is measured: training's resolution within these bounds."""
TILE_PX = 16
THUMBNAIL_PX = 16
"""Sides of the tiles of the sharpness, and of the thumbnails of the likeness."""
THUMBNAIL_MIDDLE = (slice(3, -3), slice(3, -3))
"""Middle of a thumbnail, without a frame of three cells."""
MAX_BACKGROUND_DIFFERENCE = 0.1
"""Two backgrounds whose colours differ by less on average, of 0 to 1, are the same."""
MIN_SUBJECT_SHARE = 0.25
"""A subject whose mask has a longer side below this share of the photo's shorter one is small."""
EDGE_PERCENTILE = 80
SHARPEST_PERCENTILE = 90
"""Percentile of steepness above which tiles are edges; percentile of these edges' sharpness that is
the photo's."""

FAULTS = {
    "blurred": ": sharpness {sharpness:.2f}, sharp photos have {usual} and more",
    "near-duplicate": " of {name}",
    "too small": " for the resolution: {width} x {height} px is enlarged {times:.1f} times",
}
"""Fault for which a photo should be left out -> how its reason continues after that name, with the
measured values in braces."""


class Reason(str):
    """Text of a photo's fault; `fault` is its key in `FAULTS`."""

    fault: str


def make_reason(fault: str, /, **values: object) -> Reason:
    """Return the fault with its measured values, as a photo's reason."""
    reason = Reason(fault + FAULTS[fault].format_map(values))
    reason.fault = fault
    return reason


def list_faults(photo: photo_file.Photo) -> list[Reason]:
    """Return the reasons of a photo that are faults. The others are mild, such as a rotation."""
    return [reason for reason in photo.reasons if isinstance(reason, Reason)]


def plan_crops(
    photo: photo_file.Photo, number: int, config: train_config.TrainConfig
) -> Iterator[augment.CropPlan]:
    """Yield the crops of photo `number` of its subject, with training's random numbers; without a
    seed those of seed 0."""
    rule = augment.build_crop_rule(config)
    stream = subjects.get_seed_name("instance", photo.subject)
    items = config.repeats * rule.resolution_count
    for item in range(number * items, (number + 1) * items):
        target = rule.get_target_size(photo.size_px, item % rule.resolution_count)
        for crop_index in range(config.crops_per_photo):
            rng = seed_rng(config.seed or 0, stream, "crop", item, crop_index)
            yield rule.plan_crop(photo.size_px, rng, target, photo.face)


def build_crop_rows(
    photos: list[photo_file.Photo], config: train_config.TrainConfig
) -> list[SheetRow]:
    """Return one row for each photo: the photo with frames, then up to five crops. Parts outside
    the mask are dark."""
    rows = []
    for index, photo in enumerate(photos):
        # Parts outside the mask at a third of their brightness
        shaded, mask = photo_file.open_rgb(photo), photo_file.open_mask(photo)
        if mask is not None:
            dark = shaded.point(lambda value: value // 3)
            shaded = Image.composite(shaded, dark, mask.resize(shaded.size))

        # The crops as training cuts them
        plans = list(islice(plan_crops(photo, index, config), MAX_CROPS))
        crops = [augment.apply_crop(shaded, plan) for plan in plans]
        for crop in crops:
            crop.thumbnail((CELL_PX, CELL_PX))

        # The whole photo, with a frame where each of them lies
        scale = CELL_PX / max(shaded.size)
        size = (max(1, round(shaded.width * scale)), max(1, round(shaded.height * scale)))
        framed = shaded.resize(size)
        for plan in plans:
            x0, y0, x1, y1 = plan.get_box(framed.width, framed.height)
            frame = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
            ImageDraw.Draw(framed).rectangle(frame, outline=FRAME_COLOUR, width=3)

        # The crops of a square photo are all equal to it: one is enough.
        remarks = []
        if len(plans) > 1 and len(set(plans)) == 1:
            remarks.append(f"all {config.crops_per_photo} crops are the same")
            crops = crops[:1]

        # The font of the sheet may lack other letters than ASCII's.
        title = "; ".join([photo.path.name, *photo.reasons, *remarks])
        rows.append(SheetRow(title.encode("ascii", "replace").decode(), [framed, *crops]))
    return rows


MIN_GOOD_PHOTOS = 3


def find_photo_faults(
    report: photo_file.PhotoReport, resolution_px: int = SHARPNESS_PX
) -> photo_file.PhotoReport:
    """Return the report with each photo's faults among its reasons, and with remarks on the whole
    set. Of near-duplicates the best photo has no fault."""
    look_px = min(SHARPNESS_PX, max(MIN_SHARPNESS_PX, resolution_px))
    photos = []
    thumbnails = []
    backgrounds = []
    for photo in report.photos:
        image = photo_file.open_rgb(photo)
        # Of any scale beside the image's; behind what is not opaque the image is white.
        mask = photo_file.open_mask(photo)
        opaque = mask if photo.mask_path == photo.path else None
        reasons = (*photo.reasons, *find_faults(image, mask, look_px))
        photos.append(replace(photo, reasons=reasons))
        thumbnails.append(compute_thumbnail(image, opaque))
        # The background of a cut-out is not learnt.
        backgrounds.append(compute_background(image, mask) * (opaque is None))
    add_duplicates(photos, thumbnails)
    return replace(report, photos=photos, remarks=tuple(list_remarks(photos, backgrounds)))


def find_faults(image: Image.Image, mask: Image.Image | None, look_px: int) -> Iterator[str]:
    """Yield what is wrong with one photo: it is blurred, or its subject small."""
    sharpness = measure_sharpness(image, look_px)
    if sharpness < MIN_SHARPNESS:
        yield make_reason("blurred", sharpness=sharpness, usual=MIN_SHARPNESS)
    share = measure_frame_share(mask) if mask is not None else 1.0
    if share < MIN_SUBJECT_SHARE:
        yield f"small subject: {share:.0%} of the frame"


def add_duplicates(photos: list[photo_file.Photo], thumbnails: list[np.ndarray]) -> None:
    """Add the fault of a near-duplicate to each photo that is one, in place."""

    # The best is kept: without faults, then with more pixels. The others are compared with the
    # better ones.
    def get_quality(number: int) -> tuple[bool, int]:
        return not list_faults(photos[number]), math.prod(photos[number].size_px)

    best_first = sorted(range(len(photos)), key=get_quality, reverse=True)
    for rank, number in enumerate(best_first[1:], start=1):
        nearest = max(best_first[:rank], key=lambda n: thumbnails[n] @ thumbnails[number])
        if thumbnails[nearest] @ thumbnails[number] > MAX_LIKENESS:
            duplicate = make_reason("near-duplicate", name=photos[nearest].path.name)
            reasons = (*photos[number].reasons, duplicate)
            photos[number] = replace(photos[number], reasons=reasons)


def list_remarks(photos: list[photo_file.Photo], backgrounds: list[np.ndarray]) -> Iterator[str]:
    """Yield remarks on the whole set: too few photos, or the same background on most."""
    good = [number for number, photo in enumerate(photos) if not list_faults(photo)]
    if len(photos) < MIN_GOOD_PHOTOS:
        advice = "of a thing the command “enlarge” makes them from one"
        yield f"too few: take {MIN_GOOD_PHOTOS} or more; {advice}"
    elif len(good) < MIN_GOOD_PHOTOS:
        yield (
            f"only {len(good)} of {len(photos)} photos {'is' if len(good) == 1 else 'are'} "
            "without a fault: better ones help; training takes all"
        )
    same_count = count_same_backgrounds([backgrounds[number] for number in good])
    if same_count >= MIN_GOOD_PHOTOS and same_count > len(good) / 2:
        yield (
            f"{same_count} of {len(good)} have the same background, which is learnt with the "
            "subject: take some elsewhere"
        )


def log_faults(report: photo_file.PhotoReport) -> None:
    """Log the faults of the photos of an examined report, in one line."""
    photo_faults = [
        f"{photo.path.name} ({', '.join(faults)})"
        for photo in report.photos
        if (faults := list_faults(photo))
    ]
    if remarks := [*report.remarks, *photo_faults]:
        logger.warning("%s", escape_control_characters(f"the photos: {'; '.join(remarks)}"))


def measure_sharpness(image: Image.Image, look_px: int = SHARPNESS_PX) -> float:
    """Return the steepness of the sharpest edges of an RGB image scaled to `look_px`; 0 when it has
    no edges."""
    scale = look_px / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    if min(grey.shape) < TILE_PX + 2:
        return MIN_SHARPNESS  # too few pixels to tell

    # Laplacian L and gradient ∇ by the four neighbours of each pixel
    inner = grey[1:-1, 1:-1]
    upper = grey[:-2, 1:-1]
    lower = grey[2:, 1:-1]
    left_side = grey[1:-1, :-2]
    right_side = grey[1:-1, 2:]
    second = compute_tile_energy((4 * inner - upper - lower - left_side - right_side) ** 2)
    first = compute_tile_energy(((right_side - left_side) ** 2 + (lower - upper) ** 2) / 4)

    # Only tiles with edges tell: a plain wall is not blurred.
    edges = first >= np.percentile(first, EDGE_PERCENTILE)
    return float(np.percentile((second / (first + 1))[edges], SHARPEST_PERCENTILE))


def measure_frame_share(mask: Image.Image) -> float:
    """Return the longer side of the subject in a mask (L), as a share of the mask's shorter
    side."""
    x0, y0, x1, y1 = mask.point(lambda value: value // 128).getbbox() or (0, 0, 0, 0)
    return max(x1 - x0, y1 - y0) / min(mask.size)


def compute_tile_energy(squares: np.ndarray) -> np.ndarray:
    """Return the root mean square of each tile: (h, w) -> (h // 16, w // 16)."""
    rows, columns = (side // TILE_PX for side in squares.shape)
    tiles = squares[: rows * TILE_PX, : columns * TILE_PX].reshape(rows, TILE_PX, columns, TILE_PX)
    return np.sqrt(tiles.mean((1, 3)))


def compute_thumbnail(image: Image.Image, opaque: Image.Image | None = None) -> np.ndarray:
    """Return the colours of the middle at 16 × 16 as a vector (300,) with mean 0 and length 1;
    zeros for a single flat colour. The white behind parts that are not `opaque` (L) counts as the
    mean of the others."""
    values = resize_square(image, THUMBNAIL_PX).astype(np.float32)[THUMBNAIL_MIDDLE]
    share = np.float32(1)
    if opaque is not None:
        share = (
            resize_square(opaque, THUMBNAIL_PX).astype(np.float32)[THUMBNAIL_MIDDLE][..., None]
            / 255
        )

    # Take the white away that lies behind, then the mean of what is opaque.
    values -= 255 * (1 - share)
    values -= share * values.mean() / max(share.mean(), 1e-6)

    # The product of two such vectors is their correlation.
    values = values.ravel()
    length = float(np.linalg.norm(values))
    return values / length if length > 1e-3 else values * 0


def compute_background(image: Image.Image, mask: Image.Image | None = None) -> np.ndarray:
    """Return (16, 16, 4): colours from 0 to 1, and the background's share of each cell. Background
    is outside the mask (L), or without one outside the middle."""
    outside = np.ones((THUMBNAIL_PX, THUMBNAIL_PX))
    if mask is None:
        outside[THUMBNAIL_MIDDLE] = 0
    else:
        outside -= resize_square(mask, THUMBNAIL_PX) / 255
    return np.dstack([resize_square(image, THUMBNAIL_PX) / 255, outside])


def count_same_backgrounds(backgrounds: list[np.ndarray]) -> int:
    """Return the size of the largest group of photos that have the same background as one of them;
    0 for no photos."""
    counts = (
        sum(is_same_background(background, candidate) for candidate in backgrounds)
        for background in backgrounds
    )
    return max(counts, default=0)


def is_same_background(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two backgrounds have the same colours where both are visible."""
    visible = first[..., 3] * second[..., 3]
    difference = np.abs(first[..., :3] - second[..., :3]).mean(-1)
    return bool((visible * difference).sum() < MAX_BACKGROUND_DIFFERENCE * visible.sum())


def resize_square(image: Image.Image, side_px: int) -> np.ndarray:
    """Return the image at `side_px` squared, each pixel the mean of those that it covers."""
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BOX, reducing_gap=3.0))
