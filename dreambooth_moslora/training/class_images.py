"""Captions, masks and class images that a run makes before its first step, where they are missing.

Captions and masks (`--captions auto`, `--masks auto`) are made before the base is loaded.

Class images for prior preservation (Ruiz et al. 2022, section 3.3) show what the base already knows
of the class. A folder is topped up to the wanted number with generated images of the class prompt,
and the user's own images come first. A generated image's name says what shaped it: those of another
prompt, base, seed, size or encoding stay in the folder unused, which is logged. If one is
missing or cannot be opened, its batch is generated again: alone, it would have other bytes.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.families import build_encoding_options
from dreambooth_moslora.disk.atomic import clean_temporaries, write_atomic
from dreambooth_moslora.disk.contents import hash_values
from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.generation.offload import Placement
from dreambooth_moslora.generation.sampling import generate_batches, generate_images
from dreambooth_moslora.photos import augment, masks, photo_file
from dreambooth_moslora.photos.captions import (
    Captioner,
    GeneratedCaption,
    load_captioner,
    make_run_caption,
    save_caption,
)
from dreambooth_moslora.photos.folder import find_photos, list_usable_photos
from dreambooth_moslora.photos.photo_file import Photo, UnreadableImageError, open_image
from dreambooth_moslora.pictures import encode_png
from dreambooth_moslora.plan.distributed import require_agreement, run_on_main, share_work
from dreambooth_moslora.plan.steps import split_total
from dreambooth_moslora.seeds import compute_seed
from dreambooth_moslora.settings.family_facts import get_text_options
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import reporter

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
"""Thing that lacks something, such as a photo."""
Made = TypeVar("Made")
"""Result for an item, such as a caption."""
Model = TypeVar("Model")
"""Model that makes it."""


def make_distributed(
    context: reporter.RunContext,
    phase: str,
    items: Sequence[Item],
    make: Callable[[Item], Made],
    keep: Callable[[Item, Made], object],
) -> None:
    """Make what is missing, shared out among the processes.

    phase: what the reporter calls it
    items: what is missing, equal in all processes
    make: makes one
    keep: keeps one; the main process does it

    Raises StopRequestedError between items, and an item's error in all processes.
    """
    accelerator = context.accelerator

    def make_share(share: Sequence[Item]) -> Generator[Made, None, None]:
        for item in share:
            context.raise_if_local_stop()
            yield make(item)

    # How many are done, each time that one is kept.
    def keep_and_count() -> Iterator[int]:
        results = share_work(accelerator, items, make_share)
        for count, (item, result) in enumerate(zip(items, results, strict=True), start=1):
            run_on_main(accelerator, partial(keep, item, result))
            yield count

    for _ in context.report.report_counts(phase, keep_and_count(), len(items)):
        pass
    context.raise_if_stop_requested()


def make_for_photos(
    config: TrainConfig,
    context: reporter.RunContext,
    kind: str,
    photos: list[Photo],
    load: Callable[[TrainConfig, torch.device], Model],
    make: Callable[[Photo, Model], Made],
    keep: Callable[[Photo, Made], object],
) -> None:
    """Make what photos lack, by the model of each one's subject.

    kind: what is made: "caption" or "mask"
    photos: those that lack it, in the order of their subjects
    load: loads the model of a subject; one is in memory at a time
    make: makes it for one photo
    keep: keeps it; the main process does that

    Raises UserError and StopRequestedError.
    """
    subjects, device = config.each_subject, context.accelerator.device
    same = require_agreement(
        context.accelerator,
        lambda: photos,
        lambda agreed_photos: f"{len(agreed_photos)} photos without a {kind}",
    )

    # The photos come by subject, so each model is loaded once.
    @lru_cache(maxsize=1)
    def get_model(subject: int) -> Model:
        return load(subjects[subject], device)

    def make_item(photo: Photo) -> Made:
        return make(photo, get_model(photo.subject))

    make_distributed(context, f"{kind}s", same, make_item, keep)
    get_model.cache_clear()
    devices.free_unused_memory(device)


def make_captions(config: TrainConfig, context: reporter.RunContext, photos: list[Photo]) -> None:
    """Make the captions that the photos and the run folder lack. Raises UserError and
    StopRequestedError."""
    bare = [photo for photo in photos if not photo.is_captioned]
    if config.captions != "auto" or not bare:
        return
    subjects = config.each_subject
    path = context.run_dir.captions_path

    # The instance prompt is a part of a caption, and each subject has its own.
    def make(photo: Photo, captioner: Captioner) -> GeneratedCaption:
        return make_run_caption(photo, captioner, subjects[photo.subject].instance_prompt, path)

    def keep_and_log(photo: Photo, caption: GeneratedCaption) -> None:
        save_caption(path, caption, subjects[photo.subject].instance_prompt)
        logger.info(
            "%s",
            escape_control_characters(f"{photo.path.name}: {caption.caption or caption.remark}"),
        )

    make_for_photos(
        config,
        context,
        kind="caption",
        photos=bare,
        load=load_captioner,
        make=make,
        keep=keep_and_log,
    )


def make_masks(config: TrainConfig, context: reporter.RunContext, photos: list[Photo]) -> None:
    """Make the masks that the photos and the run folder lack. Raises UserError and
    StopRequestedError."""
    if config.masks == "given":
        return
    folder = context.run_dir.masks_dir

    # Masks that training made are asked for again: `make_run_mask` finds those that are here.
    without_saved_masks = [photo_file.drop_saved_mask(photo, folder) for photo in photos]
    bare = [photo for photo in without_saved_masks if photo.mask_path is None]
    if not bare:
        return

    def log_remark(photo: Photo, mask: masks.GeneratedMask) -> None:
        if mask.remark:
            logger.warning(
                "%s", escape_control_characters(f"the mask of {photo.path.name}: {mask.remark}")
            )

    make_for_photos(
        config,
        context,
        kind="mask",
        photos=bare,
        load=masks.load_segmenter,
        make=partial(masks.make_run_mask, folder=folder),
        keep=log_remark,
    )


GENERATED_PATTERN = re.compile(r"class_[0-9a-f]{8}_\d{5}\.png")
UNUSED_NOTE = (
    "{folder}: {unused} generated class images are of another base, class prompt, size or --seed, "
    "or of an earlier version: they stay unused, and {lacking} of “{prompt}” are drawn."
)


@dataclass(frozen=True)
class ClassImages:
    """Generated class images of one prompt, base, seed and size.

    folder: where they lie, beside the user's own
    prompt: the class prompt
    model: the name of the base, without its path, and the digest of its parts
    seed: of the run
    size_px: (h, w)
    text_options: arguments of `encode_prompt` that the run sets
    """

    folder: Path
    prompt: str
    model: str
    seed: int
    size_px: tuple[int, int]
    text_options: dict[str, Any] = field(default_factory=dict)

    def get_path(self, index: int) -> Path:
        """Return the file of an image. Its name says what shapes the image: those of another
        prompt, base, seed, size or encoding have other names."""
        height, width = self.size_px
        size = height if height == width else f"{width}x{height}"
        tag = compute_seed(self.prompt, self.model, self.seed, size, *self.text_options.values())
        return self.folder / f"class_{tag % 16**8:08x}_{index:05d}.png"

    def is_readable(self, index: int) -> bool:
        """Return whether the image exists and opens."""
        try:
            open_image(self.get_path(index))
        except UnreadableImageError:
            return False
        return True

    def list_missing(self, count: int, batch_size: int) -> list["ClassBatch"]:
        """Return the batches of the first `count` images that lack one: drawn in another batch, an
        image has other bytes."""
        batches = []
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            if not all(map(self.is_readable, indices)):
                batches.append(ClassBatch(self, tuple(indices)))
        return batches


@dataclass(frozen=True)
class ClassBatch:
    """Class images that are generated together.

    images: the set they belong to
    indices: their numbers in it
    """

    images: ClassImages
    indices: tuple[int, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the noise, one for each image."""
        seed = self.images.seed
        return [compute_seed(seed, "class_image", index) % 2**32 for index in self.indices]

    def keep(self, files: list[bytes]) -> None:
        """Write those files. An image that is there stays, as a run that shares the folder may have
        read it."""
        for index, content in zip(self.indices, files, strict=True):
            if not self.images.is_readable(index):
                write_atomic(self.images.get_path(index), content)


ClassImageSets = list[tuple[ClassImages, int]]
"""Sets of generated images, one per size, each with the wanted number."""


def make_class_photos(
    config: TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    photos: list[Photo],
    digests: Mapping[str, str],
) -> list[list[Photo]]:
    """Class images of each subject, in the sizes of its photos' crops.

    config: the run's settings
    context: the run's folder, processes and reporter
    pipeline: the base, loaded
    photos: of all subjects
    digests: of the base's parts

    Subjects of one class share their class images. Raises UserError and StopRequestedError.
    """
    class_photos: dict[tuple[str, str | None], list[Photo]] = {}
    subjects = config.each_subject
    rule = augment.build_crop_rule(config)
    keys = [(subject.class_prompt, subject.class_data_dir) for subject in subjects]
    for subject, key in zip(subjects, keys):
        if key in class_photos:
            continue
        class_subject_photos = [photo for photo in photos if keys[photo.subject] == key]
        sizes = Counter(rule.get_target_size(photo.size_px) for photo in class_subject_photos)
        folder = Path(subject.class_data_dir or context.run_dir.class_images_dir)
        class_photos[key] = fill_class_images(folder, subject, context, pipeline, sizes, digests)
    return [class_photos[key] for key in keys]


def fill_class_images(
    folder: Path,
    config: TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    sizes: Mapping[tuple[int, int], int],
    digests: Mapping[str, str],
) -> list[Photo]:
    """Return the user's class images, then generated ones up to `num_class_images`.

    folder: where both lie
    config: the settings of the subject
    context: the run's folder, processes and reporter
    pipeline: the base, loaded
    sizes: (h, w) -> its share of the images, in any unit
    digests: of the base's parts

    Raises UserError and StopRequestedError.
    """
    accelerator = context.accelerator
    sets, lacking = run_on_main(
        accelerator, lambda: plan_class_images(folder, config, sizes, digests)
    )
    if lacking:
        # Where the base is too large for the device, it is streamed as where a person draws.
        placement = Placement(pipeline, accelerator.device)
        placement.enter()

        guidance = Base.of(config).guidance

        # As many at once as found room before.
        at_once = config.sample_batch_size

        def set_batch_size(size: int) -> None:
            nonlocal at_once
            at_once = size

        def generate_batch(batch: ClassBatch) -> list[bytes]:
            generate = partial(
                generate_images,
                pipeline,
                batch.images.prompt,
                should_stop=context.should_stop,
                size_px=batch.images.size_px,
                guidance=guidance,
                text_options=batch.images.text_options,
            )
            images = generate_batches(
                batch.seeds, at_once, generate, accelerator.device, set_batch_size
            )
            return [encode_png(image) for image in images]

        make_distributed(context, "class_images", lacking, generate_batch, ClassBatch.keep)
        placement.end()

    # Every process looks into the folder, and all have to find the same.
    find_usable = partial(find_usable_class_photos, folder, config, sets)
    return require_agreement(
        accelerator, find_usable, lambda usable_photos: f"{len(usable_photos)} class images"
    )


def plan_class_images(
    folder: Path,
    config: TrainConfig,
    sizes: Mapping[tuple[int, int], int],
    digests: Mapping[str, str],
) -> tuple[ClassImageSets, list[ClassBatch]]:
    """Return the run's sets of generated images, each with its count, and the batches to generate.
    Creates the folder, and logs generated images in it that the run does not use."""
    # A set of each size. A name alone may have come to another base.
    model = f"{get_public_name(config.pretrained_model_name_or_path)} {hash_values(**digests)}"
    options = build_encoding_options(get_text_options(config))
    sets = []
    for size in sizes:
        images = ClassImages(
            folder=folder,
            prompt=config.class_prompt,
            model=model,
            seed=config.seed,
            size_px=size,
            text_options=options,
        )
        sets.append(images)

    # How many are wanted: what the user's own do not make up.
    folder_photos = []
    if folder.is_dir():
        folder_photos = find_photos(
            folder, config.class_prompt, config.resolution, alpha="white"
        ).photos
    generated = {photo.path for photo in folder_photos if is_generated(photo)}
    generated_total = max(0, config.num_class_images - (len(folder_photos) - len(generated)))
    counts = split_total(sizes, generated_total)

    # What is to be drawn of them.
    folder.mkdir(parents=True, exist_ok=True)
    clean_temporaries(folder)
    counted = [(images, counts[images.size_px]) for images in sets]
    lacking = []
    for images, count in counted:
        lacking += images.list_missing(count, config.sample_batch_size)
        generated -= {images.get_path(index) for index in range(count)}
    if lacking and generated:
        line = UNUSED_NOTE.format(
            folder=folder,
            unused=len(generated),
            prompt=config.class_prompt,
            lacking=sum(len(batch.indices) for batch in lacking),
        )
        logger.info("%s", escape_control_characters(line))
    return counted, lacking


def find_usable_class_photos(
    folder: Path, config: TrainConfig, sets: ClassImageSets
) -> list[Photo]:
    """`num_class_images` images, the user's own first. Raises UserError for fewer: the prior would
    be weaker."""
    report = find_photos(folder, config.class_prompt, config.resolution, alpha="white")
    folder_photos = list_usable_photos(report)
    usable = [photo for photo in folder_photos if not is_generated(photo)]

    # Generated ones of this run's sets; others are of another prompt, base, seed or size.
    generated_paths = set()
    for images, count in sets:
        generated_paths |= {images.get_path(index) for index in range(count)}
    usable += [photo for photo in folder_photos if photo.path in generated_paths]
    usable = usable[: config.num_class_images]
    if len(usable) < config.num_class_images:
        raise UserError(
            f"only {len(usable)} of {config.num_class_images} class images in {folder} "
            "can be used; remove the broken ones, which are then made again, "
            "or give another --class_data_dir."
        )
    return usable


def is_generated(photo: Photo) -> bool:
    """Return whether a class image was generated, as its name tells."""
    return GENERATED_PATTERN.fullmatch(photo.path.name) is not None
