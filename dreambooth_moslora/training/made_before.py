"""What is made before the first step: captions, masks and class images.

`--captions auto` and `--masks auto`: photos without a caption or a mask get one before the base is loaded. The class
images are the user's own, and those that the frozen base draws. `make_missing` makes all three.
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base.families import denoiser_of
from dreambooth_moslora.core import UserError, clean_stale, public_name, spelled_out
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos import masks, photo_file
from dreambooth_moslora.photos.captions import Captioner, MadeCaption, keep, load_captioner, make_for_run
from dreambooth_moslora.photos.folder import find_photos, usable_photos
from dreambooth_moslora.plan.processes import DTYPES, agreed, on_main, share_out
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import class_images, frozen_base, reporter

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


Sets = list[tuple[class_images.ClassImages, int]]  # Sets of generated images, one per size, each with the wanted number


def class_photos_of_each(
    config: TrainConfig, context: reporter.RunContext, pipeline: DiffusionPipeline, photos: list[photo_file.Photo]
) -> list[list[photo_file.Photo]]:
    """Class images of each subject, in the sizes of its photos' crops. Subjects of one class share theirs."""
    found: dict[tuple[str, str | None], list[photo_file.Photo]] = {}
    subjects, rule = config.each_subject, photo_file.crop_rule(config)
    keys = [(subject.class_prompt, subject.class_data_dir) for subject in subjects]
    for subject, key in zip(subjects, keys):
        if key not in found:
            sizes = Counter(rule.target(photo.size_px) for photo in photos if keys[photo.subject] == key)
            found[key] = make_class_images(subject, context, pipeline, sizes)
    return [found[key] for key in keys]


def make_class_images(
    config: TrainConfig, context: reporter.RunContext, pipeline: DiffusionPipeline, sizes: Mapping[tuple[int, int], int]
) -> list[photo_file.Photo]:
    """The user's own class images, then generated ones up to `num_class_images`, in the proportion of `sizes`."""
    accelerator = context.accelerator
    folder = Path(config.class_data_dir) if config.class_data_dir else context.run_dir.class_images_dir
    sets, lacking = on_main(accelerator, lambda: planned(folder, config, sizes))
    if wanted := sum(count for _, count in sets):
        precision, device = denoiser_of(pipeline).dtype, accelerator.device
        wanted_precision = DTYPES.get(config.prior_generation_precision or "", precision)

        @cache
        def drawing() -> DiffusionPipeline:
            is_same = wanted_precision == precision
            return (pipeline if is_same else frozen_base.load_base(config, wanted_precision, device)).to(device)

        def draw(batch: class_images.ClassBatch) -> list[bytes]:
            size_px, should_stop = batch.images.size_px, context.should_stop
            return batch.files(partial(generate_images, drawing(), size_px=size_px, should_stop=should_stop))

        done = wanted - sum(map(len, lacking))
        make_missing(context, "class_images", lacking, draw, class_images.ClassBatch.keep, size=len, done=done)
    usable = partial(usable_class_photos, folder, config, sets)
    return agreed(accelerator, usable, lambda found: f"{len(found)} class images")


def planned(
    folder: Path, config: TrainConfig, sizes: Mapping[tuple[int, int], int]
) -> tuple[Sets, list[class_images.ClassBatch]]:
    """The sets of the run beside the user's own images, and the batches to draw for them. The folder is made."""
    base_id = public_name(config.pretrained_model_name_or_path)
    sets = [class_images.ClassImages(folder, config.class_prompt, base_id, config.seed, size) for size in sizes]
    paths = []
    if folder.is_dir():
        found = find_photos(folder, config.class_prompt, config.resolution, alpha="white").photos
        paths = [photo.path for photo in found]
    wanted = max(0, config.num_class_images - len(paths) + len(sets[0].generated(paths)))
    counts = class_images.shares(sizes, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    clean_stale(folder)
    counted = [(images, counts[images.size_px]) for images in sets]
    return counted, [batch for images, count in counted for batch in images.lacking(count, config.sample_batch_size)]


def usable_class_photos(folder: Path, config: TrainConfig, sets: Sets) -> list[photo_file.Photo]:
    """`num_class_images` images, the user's own first. Raises UserError for fewer: the prior would be weaker."""
    found = usable_photos(find_photos(folder, config.class_prompt, config.resolution, alpha="white"))
    paths = [photo.path for photo in found]
    stale = set.intersection(*(images.stale(paths) for images, _ in sets))
    wanted = {folder / images.name(index) for images, count in sets for index in range(count)}
    generated = sets[0][0].generated(paths)
    own = [photo for photo in found if photo.path not in generated]
    usable = [*own, *(photo for photo in found if photo.path in wanted - stale)][: config.num_class_images]
    if len(usable) < config.num_class_images:
        raise UserError(
            f"only {len(usable)} of {config.num_class_images} class images in {folder} can be used; "
            "remove the broken ones, which are then made again, or give another --class_data_dir."
        )
    return usable
