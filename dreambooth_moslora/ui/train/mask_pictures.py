"""Masks as a run uses them, and their outlines as the page shows them."""

from collections.abc import Iterator
from dataclasses import replace

import PIL.Image
import PIL.ImageChops
import PIL.ImageFilter

from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.photos.masks import (
    GeneratedMask,
    describe_mask_quality,
    load_segmenter,
    make_run_mask,
)
from dreambooth_moslora.photos.photo_file import open_mask
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui.workspace import Workspace

OUTLINE_RGB = (45, 240, 200)
"""Colour of the line around the part that has most weight in the loss."""
SIDE_TO_LINE_RATIO = 120
"""Ratio of a photo's longer side to the width of that line."""
NO_MASK_REMARK = "no mask: all of it is learned"
"""Remark on a photo without a mask."""


def collect_masks(config: TrainConfig, workspace: Workspace) -> Iterator[GeneratedMask]:
    """Yield the masks as a run with these settings uses them; missing ones are generated and
    stored.

    Raises UserError if a mask cannot be generated.
    """
    segmenter = load_segmenter(config) if config.masks != "given" else None
    for photo in build_photo_report(config).photos:
        # A generated mask may bring its own remark.
        if photo.mask_path is None and segmenter is not None:
            generated_mask = make_run_mask(photo, segmenter, workspace.folder / "made_masks")
            if generated_mask.remark:
                yield generated_mask
                continue
            photo = replace(photo, mask_path=generated_mask.path)
        mask = open_mask(photo)
        remark = NO_MASK_REMARK if mask is None else describe_mask_quality(mask)
        yield GeneratedMask(photo, photo.mask_path, remark)


def draw_outline(photo: PIL.Image.Image, mask: PIL.Image.Image | None) -> PIL.Image.Image:
    """Draw a line around the white part of the mask, if there is one, and return the photo."""
    if mask is None:
        return photo
    # A line of the same width in every preview, inside and outside the edge.
    white = mask.resize(photo.size).point(lambda value: 255 * (value > 127))
    width = max(1, round(max(photo.size) / SIDE_TO_LINE_RATIO))
    outer = white.filter(PIL.ImageFilter.GaussianBlur(width)).point(lambda value: 255 * (value > 8))
    line = PIL.ImageChops.subtract(outer, white)
    return PIL.Image.composite(PIL.Image.new("RGB", photo.size, OUTLINE_RGB), photo, line)
