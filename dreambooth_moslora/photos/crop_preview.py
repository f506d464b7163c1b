"""Draws the crops of training in advance: each photo with the frames of its crops, then the crops."""

from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageOps

from dreambooth_moslora.core.config.subject_tables import stream_of
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.pictures import Row
from dreambooth_moslora.core.seeding import rng
from dreambooth_moslora.photos.crops import CropPlan, apply_crop, crop_rule
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb

__all__ = ["crop_rows", "masked", "plans_of"]

FRAME_COLOUR = (232, 64, 44)
SHOWN_PX = 384
MAX_CROPS = 5


def plans_of(photo: Photo, number: int, config: TrainConfig) -> Iterator[CropPlan]:
    """The crops of photo `number` of its subject, with the random draws of training (`photo_stream.PhotoStream`).

    Without a seed they are those of seed 0, while training draws a seed.
    """
    rule, stream = crop_rule(config), stream_of("instance", photo.subject)
    for slot in range(number * config.repeats, (number + 1) * config.repeats):
        for crop in range(config.crops_per_photo):
            yield rule.plan(photo.size_px, rng(config.seed or 0, stream, "crop", slot, crop))


def crop_rows(photos: list[Photo], config: TrainConfig) -> list[Row]:
    """One row per photo: the photo with frames, then up to five crops; parts outside the mask are dark."""
    return [crop_row(photo, number, config) for number, photo in enumerate(photos)]


def crop_row(photo: Photo, number: int, config: TrainConfig) -> Row:
    image, mask = open_rgb(photo), open_mask(photo)
    shown = masked(image, mask)
    plans = list(plans_of(photo, number, config))[:MAX_CROPS]
    crops = [apply_crop(shown, plan, config.image_interpolation_mode) for plan in plans]
    title = "; ".join([photo.path.name, *photo.reasons])
    crops = [ImageOps.pad(crop, (SHOWN_PX, SHOWN_PX), color="white") for crop in crops]
    return Row(title.encode("ascii", "replace").decode(), [with_frames(shown, plans), *crops])


def masked(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """The image, with parts outside the mask at a third of their brightness."""
    if mask is None:
        return image
    dark = image.point(lambda value: value // 3)
    return Image.composite(image, dark, mask.resize(image.size))


def with_frames(image: Image.Image, plans: list[CropPlan]) -> Image.Image:
    """The whole photo, small, with the frame of each crop, padded to a square."""
    scale = SHOWN_PX / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(small)
    for plan in plans:
        draw.rectangle(frame_of(plan, small.size), outline=FRAME_COLOUR, width=3)
    return ImageOps.pad(small, (SHOWN_PX, SHOWN_PX), color="white")


def frame_of(plan: CropPlan, shown: tuple[int, int]) -> tuple[float, float, float, float]:
    """The crop's frame in the picture of (width, height) `shown`; a mirrored crop is on the other side of the photo."""
    (height, width), (whole_height, whole_width) = plan.target_size, plan.resized
    top, left = plan.crop_top_left
    left = whole_width - width - left if plan.flip else left
    across, down = shown[0] / whole_width, shown[1] / whole_height
    left, right, top, bottom = left * across, (left + width) * across - 1, top * down, (top + height) * down - 1
    return left, top, max(left, right), max(top, bottom)
