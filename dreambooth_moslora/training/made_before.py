"""Captions and masks made before the base is loaded, for photos without one: `--captions auto`, `--masks auto`.

`make_missing` makes what a run lacks before its first step; class images (`class_images`) are made by it too.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache, partial
from typing import TypeVar

import torch

from dreambooth_moslora.core import spelled_out
from dreambooth_moslora.photos import masks, photo_file
from dreambooth_moslora.photos.captions import Captioner, MadeCaption, keep, load_captioner, make_for_run
from dreambooth_moslora.plan.processes import agreed, on_main, share_out
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import reporter

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")
Model = TypeVar("Model")


def make_missing(
    context: reporter.RunContext,
    phase: str,
    items: Sequence[Item],
    make: Callable[[Item], Made],
    keep: Callable[[Item, Made], object],
    *,
    size: Callable[[Item], int] = lambda item: 1,
    done: int = 0,
) -> None:
    """`make` each of the `items`, equal in all processes and shared out; the main process does `keep`. Reported is each
    item's `size` on top of `done`. Raises StopRequestedError between items, and one's error in all."""
    accelerator = context.accelerator

    def own(share: Sequence[Item]) -> Generator[Made, None, None]:
        for item in share:
            context.raise_if_asked()
            yield make(item)

    def counts() -> Iterator[int]:
        count = done
        if count:
            yield count
        for item, made in zip(items, share_out(accelerator, items, own), strict=True):
            on_main(accelerator, partial(keep, item, made))
            count += size(item)
            yield count

    for _ in context.report.counted(phase, counts(), done + sum(map(size, items))):
        pass
    context.stop_if_asked()


def make_for_photos(
    config: TrainConfig,
    context: reporter.RunContext,
    kind: str,
    photos: list[photo_file.Photo],
    load: Callable[[TrainConfig, torch.device], Model],
    make: Callable[[photo_file.Photo, Model], Made],
    keep: Callable[[photo_file.Photo, Made], object],
) -> None:
    """Make what the photos, in the order of their subjects, lack, by each subject's model; one is in memory."""
    subjects, device = config.each_subject, context.accelerator.device
    same = agreed(context.accelerator, lambda: photos, lambda found: f"{len(found)} photos without a {kind}")
    model_of = lru_cache(maxsize=1)(lambda subject: load(subjects[subject], device))
    make_missing(context, f"{kind}s", same, lambda photo: make(photo, model_of(photo.subject)), keep)
    model_of.cache_clear()
    reporter.free_unused_memory(device)


def make_captions(config: TrainConfig, context: reporter.RunContext, photos: list[photo_file.Photo]) -> None:
    """Make the captions that the photos and the run folder lack. Raises UserError and StopRequestedError."""
    bare = [photo for photo in photos if not photo.is_captioned]
    if config.captions != "auto" or not bare:
        return
    subjects, path = config.each_subject, context.run_dir.captions_path

    def make(photo: photo_file.Photo, captioner: Captioner) -> MadeCaption:
        return make_for_run(photo, captioner, subjects[photo.subject].instance_prompt, path)

    def tell(photo: photo_file.Photo, made: MadeCaption) -> None:
        keep(path, made, subjects[photo.subject].instance_prompt)
        logger.info("%s", spelled_out(f"{photo.path.name}: {made.caption or made.remark}"))

    make_for_photos(config, context, "caption", bare, load_captioner, make, tell)


def make_masks(config: TrainConfig, context: reporter.RunContext, photos: list[photo_file.Photo]) -> None:
    """Make what the run folder lacks of masks for the photos without one. Raises UserError, StopRequestedError."""
    if config.masks != "auto":
        return
    folder = context.run_dir.masks_dir

    def tell(photo: photo_file.Photo, mask: masks.MadeMask) -> None:
        if mask.remark:
            logger.warning("%s", spelled_out(f"the mask of {photo.path.name}: {mask.remark}"))

    own = [photo_file.without_kept_mask(photo, folder) for photo in photos]
    if bare := [photo for photo in own if photo.mask_path is None]:
        make_for_photos(
            config, context, "mask", bare, masks.load_segmenter, partial(masks.make_kept, folder=folder), tell
        )
