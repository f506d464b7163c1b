"""`--masks auto`: photos without a mask get one before the base is loaded; the segmenter then leaves memory."""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.errors import spelled_out
from dreambooth_moslora.photos.mask_making import MadeMask, make_kept
from dreambooth_moslora.photos.masks import with_kept_masks, without_kept_mask
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.photos.segmenters import load_segmenter
from dreambooth_moslora.training.processes import agreed, share_out
from dreambooth_moslora.training.reporter import free_unused_memory
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["masked_photos"]

logger = logging.getLogger(__name__)


def masked_photos(context: RunContext, photos: list[Photo]) -> list[Photo]:
    """The photos; those without a mask get the one in the run folder, which is made if missing.

    Raises UserError when the segmenter is not there, and StopRequestedError.
    """
    if context.config.masks != "auto":
        return photos
    folder = context.run_dir.masks_dir
    own = [without_kept_mask(photo, folder) for photo in photos]
    bare = [photo for photo in own if photo.mask_path is None]
    if bare:
        make_masks(context, bare)
        free_unused_memory(context.accelerator.device)
    return with_kept_masks(own, folder)


def make_masks(context: RunContext, photos: list[Photo]) -> None:
    """Write masks into the run folder: the photos are shared out to the processes, which have the same, by subject."""
    same = agreed(context.accelerator, lambda: photos, lambda found: f"{len(found)} photos without a mask")
    made = share_out(context.accelerator, same, partial(masks_of_each, context))
    for _ in context.report.counted("masks", said(made), len(same)):
        pass
    context.stop_if_asked()


def masks_of_each(context: RunContext, photos: Sequence[Photo]) -> Generator[MadeMask, None, None]:
    """Make each subject's masks with its own word."""
    for number, subject in enumerate(each_subject(context.config)):
        if own := [photo for photo in photos if photo.subject == number]:
            segmenter = load_segmenter(subject, context.accelerator.device)
            for made in make_kept(own, segmenter, context.run_dir.masks_dir):
                yield made
                context.raise_if_asked()


def said(made: Iterable[MadeMask]) -> Iterator[int]:
    """Log remarks on the masks; yields each mask's number."""
    for number, mask in enumerate(made, start=1):
        if mask.remark:
            logger.warning("%s", spelled_out(f"the mask of {mask.photo.path.name}: {mask.remark}"))
        yield number
