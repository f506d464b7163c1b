"""A folder's pixels, examined: blurred photos, nearly equal pairs, one background behind most
photos, and a picture of training's crops.

Sharpness compares second differences with first ones at edges, √mean L² / √mean |∇|², over tiles;
the sharpest tenth decides, so that a plain or blurred background is fine. Real photos have 1.8 to
3.2; blurred by a Gaussian of 3 px at 1024 px they have 0.5 to 0.8. Likeness is the correlation of
the middles of 16 × 16 thumbnails, so that a head that turns before one wall is no copy: different
photos of one subject have up to 0.8; a copy that is cropped by a few percent, brighter or smaller
has 0.93 to 1. Backgrounds are compared by their colours, in what the middle leaves, or outside of
the masks: photos before one wall differ by up to 0.1, others by 0.11 and more.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from dreambooth_moslora.errors import escape_control_characters
from dreambooth_moslora.photos import augment, faults, folder, photo_file
from dreambooth_moslora.pictures import SheetRow
from dreambooth_moslora.seeds import seed_rng
from dreambooth_moslora.settings import subjects, train_config

logger = logging.getLogger(__name__)

# The picture of training's crops: colour of the frames, side of each cell, most crops of a photo
FRAME_COLOUR = (232, 64, 44)
CELL_PX = 384
MAX_CROPS = 5
# A photo below this sharpness is blurred; two photos above this likeness are the same
MIN_SHARPNESS = 0.85
MAX_LIKENESS = 0.92
# Shorter side at which sharpness is measured: training's resolution within these bounds
SHARPNESS_PX = 512
MIN_SHARPNESS_PX = 128
# Sides of the tiles of the sharpness, and of the thumbnails of the likeness
TILE_PX = 16
THUMBNAIL_PX = 16
# The middle of a thumbnail, without a frame of three cells
THUMBNAIL_MIDDLE = (slice(3, -3), slice(3, -3))
# Two backgrounds whose colours differ by less on average, of 0 to 1, are the same
MAX_BACKGROUND_DIFFERENCE = 0.1
# A subject whose mask has a longer side below this share of the photo's shorter one is small
MIN_SUBJECT_SHARE = 0.25
# Tiles with steeper steps than this share of all tiles are edges; of these, this one decides
EDGE_PERCENTILE = 80
SHARPEST_PERCENTILE = 90


def plan_crops(
    photo: photo_file.Photo, number: int, config: train_config.TrainConfig
) -> Iterator[augment.CropPlan]:
    """The crops of photo `number` of its subject, with the random draws of training; without a seed
    those of seed 0."""
    rule = augment.build_crop_rule(config)
    stream = subjects.get_seed_name("instance", photo.subject)
    for slot in range(number * config.repeats, (number + 1) * config.repeats):
        for crop in range(config.crops_per_photo):
            draws = seed_rng(config.seed or 0, stream, "crop", slot, crop)
            yield rule.plan_crop(photo.size_px, draws, face=photo.face)


def build_crop_rows(
    photos: list[photo_file.Photo], config: train_config.TrainConfig
) -> list[SheetRow]:
    """One row per photo: the photo with frames, then up to five crops; parts outside the mask are
    dark."""
    rows = []
    for number, photo in enumerate(photos):
        shown = shade_outside(photo_file.open_rgb(photo), photo_file.open_mask(photo))
        plans = list(islice(plan_crops(photo, number, config), MAX_CROPS))

        # The crops as training cuts them
        crops = [augment.apply_crop(shown, plan) for plan in plans]
        for crop in crops:
            crop.thumbnail((CELL_PX, CELL_PX))

        # The whole photo, with a frame where each of them lies
        scale = CELL_PX / max(shown.size)
        size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
        framed = shown.resize(size)
        for plan in plans:
            left, top, right, bottom = plan.get_box(framed.width, framed.height)
            frame = (left, top, max(left, right - 1), max(top, bottom - 1))
            ImageDraw.Draw(framed).rectangle(frame, outline=FRAME_COLOUR, width=3)

        # Of a square photo each crop is the whole: one tells as much.
        remarks = []
        if len(plans) > 1 and len(set(plans)) == 1:
            remarks.append(f"all {config.crops_per_photo} crops are the same")
            crops = crops[:1]

        # The font of the sheet may lack other letters than ASCII's.
        title = "; ".join([photo.path.name, *photo.reasons, *remarks])
        rows.append(SheetRow(title.encode("ascii", "replace").decode(), [framed, *crops]))
    return rows


def shade_outside(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """The image, with parts outside the mask at a third of their brightness."""
    if mask is None:
        return image
    dark = image.point(lambda value: value // 3)
    return Image.composite(image, dark, mask.resize(image.size))


# Fewest good photos that are enough
MIN_GOOD_PHOTOS = 3


def find_photo_faults(
    report: folder.PhotoReport, resolution_px: int = SHARPNESS_PX
) -> folder.PhotoReport:
    """The report with what is wrong with a photo as its reasons, and with the whole set as remarks.
    Of equal photos the worse ones are duplicates."""
    look_px = min(SHARPNESS_PX, max(MIN_SHARPNESS_PX, resolution_px))
    photos = []
    thumbnails = []
    backgrounds = []

    # Faults of single photos
    for photo in report.photos:
        image = photo_file.open_rgb(photo)
        # Of any scale beside the image's; behind what is not opaque the image is white.
        mask = photo_file.open_mask(photo)
        opaque = mask if photo.mask_path == photo.path else None
        reasons = []
        sharp = measure_sharpness(image, look_px)
        if sharp < MIN_SHARPNESS:
            reasons.append(faults.make_reason("blurred", sharpness=sharp, usual=MIN_SHARPNESS))
        share = measure_frame_share(mask) if mask is not None else 1.0
        if share < MIN_SUBJECT_SHARE:
            reasons.append(f"small subject: {share:.0%} of the frame")
        thumbnails.append(compute_thumbnail(image, opaque))
        # What is behind a cut-out is not learnt.
        backgrounds.append(compute_background(image, mask) * (opaque is None))
        photos.append(replace(photo, reasons=(*photo.reasons, *reasons)))

    # Near-duplicates: each photo is compared with the better ones, so that the best is kept.
    best_first = sorted(range(len(photos)), key=lambda n: get_quality_key(photos[n]), reverse=True)
    for place, number in enumerate(best_first[1:], start=1):
        better = best_first[:place]
        nearest = max(better, key=lambda n: thumbnails[n] @ thumbnails[number])
        if thumbnails[nearest] @ thumbnails[number] > MAX_LIKENESS:
            equal = faults.make_reason("near-duplicate", name=photos[nearest].path.name)
            reasons = (*photos[number].reasons, equal)
            photos[number] = replace(photos[number], reasons=reasons)

    # What is to be said of all of them.
    remarks = []
    good = [number for number, photo in enumerate(photos) if not faults.list_faults(photo)]
    if len(photos) < MIN_GOOD_PHOTOS:
        made = "of a thing the command “enlarge” makes them from one"
        remarks.append(f"too few: take {MIN_GOOD_PHOTOS} or more; {made}")
    elif len(good) < MIN_GOOD_PHOTOS:
        remarks.append(
            f"only {len(good)} of {len(photos)} photos {'is' if len(good) == 1 else 'are'} "
            "without a fault: better ones help; training takes all"
        )
    same = count_same_backgrounds([backgrounds[number] for number in good])
    if same >= MIN_GOOD_PHOTOS and same > len(good) / 2:
        remarks.append(
            f"{same} of {len(good)} have the same background, which is learnt with the subject: "
            "take some elsewhere"
        )
    return replace(report, photos=photos, remarks=tuple(remarks))


def log_faults(report: folder.PhotoReport) -> None:
    """Say in one line of the log what is wrong with the photos of an examined report."""
    found = list(report.remarks)
    for photo in report.photos:
        reasons = faults.list_faults(photo)
        if reasons:
            found.append(f"{photo.path.name} ({', '.join(reasons)})")
    if found:
        logger.warning("%s", escape_control_characters(f"the photos: {'; '.join(found)}"))


def get_quality_key(photo: photo_file.Photo) -> tuple[bool, int]:
    """Greater for the one of equal photos that is kept: a good one, then one with more pixels."""
    height, width = photo.size_px
    return not faults.list_faults(photo), height * width


def measure_sharpness(image: Image.Image, look_px: int = SHARPNESS_PX) -> float:
    """Steepness of the sharpest edges of an RGB picture, scaled to `look_px`; 0 when it has no
    edges."""
    scale = look_px / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    if min(grey.shape) < TILE_PX + 2:
        return MIN_SHARPNESS  # too few pixels to tell

    # Laplacian L and gradient ∇ by the four neighbours of each pixel
    inner = grey[1:-1, 1:-1]
    up = grey[:-2, 1:-1]
    down = grey[2:, 1:-1]
    left = grey[1:-1, :-2]
    right = grey[1:-1, 2:]
    second = compute_tile_energy((4 * inner - up - down - left - right) ** 2)
    first = compute_tile_energy(((right - left) ** 2 + (down - up) ** 2) / 4)

    # Only tiles with edges tell: a plain wall is not blurred.
    edges = first >= np.percentile(first, EDGE_PERCENTILE)
    return float(np.percentile((second / (first + 1))[edges], SHARPEST_PERCENTILE))


def measure_frame_share(mask: Image.Image) -> float:
    """How much of the shorter side the longer side of what a mask (L) shows fills."""
    left, top, right, bottom = mask.point(lambda value: value // 128).getbbox() or (0, 0, 0, 0)
    return max(right - left, bottom - top) / min(mask.size)


def compute_tile_energy(squares: np.ndarray) -> np.ndarray:
    """(h, w) -> (h // 16, w // 16): root mean square of each tile."""
    rows, columns = (side // TILE_PX for side in squares.shape)
    tiles = squares[: rows * TILE_PX, : columns * TILE_PX].reshape(rows, TILE_PX, columns, TILE_PX)
    return np.sqrt(tiles.mean((1, 3)))


def compute_thumbnail(image: Image.Image, opaque: Image.Image | None = None) -> np.ndarray:
    """Colours of the middle at 16 × 16 as a vector (300,) with mean 0 and length 1; zeros for a
    single flat colour. The white behind parts that are not `opaque` (L) counts as the mean of the
    others."""
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
    """(16, 16, 4): colours from 0 to 1, and how much of each cell is background: what lies outside
    the mask (L), or without one outside the middle."""
    outside = np.ones((THUMBNAIL_PX, THUMBNAIL_PX))
    if mask is None:
        outside[THUMBNAIL_MIDDLE] = 0
    else:
        outside -= resize_square(mask, THUMBNAIL_PX) / 255
    return np.dstack([resize_square(image, THUMBNAIL_PX) / 255, outside])


def count_same_backgrounds(backgrounds: list[np.ndarray]) -> int:
    """The most photos whose backgrounds are the same as that of one of them, itself too; 0 for
    none."""
    counts = [0]
    for one in backgrounds:
        same = [is_same_background(one, other) for other in backgrounds]
        counts.append(sum(same))
    return max(counts)


def is_same_background(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two backgrounds have the same colours where both are seen."""
    seen = first[..., 3] * second[..., 3]
    apart = np.abs(first[..., :3] - second[..., :3]).mean(-1)
    return bool((seen * apart).sum() < MAX_BACKGROUND_DIFFERENCE * seen.sum())


def resize_square(image: Image.Image, side_px: int) -> np.ndarray:
    """The picture at `side_px` squared, each pixel the mean of those that it covers."""
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BOX, reducing_gap=3.0))
