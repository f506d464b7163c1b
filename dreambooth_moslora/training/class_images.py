"""What a run makes before its first step: captions, masks and class images that photos and folders
lack.

Captions and masks (`--captions auto`, `--masks auto`) are made before the base is loaded.

Class images for prior preservation (Ruiz et al. 2022, section 3.3) show what the base already knows
of the class. A folder is topped up to the wanted number with generated images of the class prompt,
and the user's own images come first. A generated image's name says what shaped it: those of another
prompt, base, seed, size or encoding stay in the folder unused, which is logged. If one is
missing or cannot be opened, its batch is drawn again: alone, it would have other bytes.
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

from dreambooth_moslora.base.families import build_encoding_options
from dreambooth_moslora.disk.atomic import clean_temporaries, write_atomic
from dreambooth_moslora.disk.contents import hash_values
from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.generation.offload import Placement
from dreambooth_moslora.generation.sampling import generate_images, in_batches
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
from dreambooth_moslora.plan.plan import split_total
from dreambooth_moslora.seeds import compute_seed
from dreambooth_moslora.settings.family_facts import get_text_options
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import reporter

logger = logging.getLogger(__name__)

# What is made: a `Made` of each `Item`, by a `Model`.
Item = TypeVar("Item")
Made = TypeVar("Made")
Model = TypeVar("Model")


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
        made = share_work(accelerator, items, make_share)
        for count, (item, one) in enumerate(zip(items, made, strict=True), start=1):
            run_on_main(accelerator, partial(keep, item, one))
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
        context.accelerator, lambda: photos, lambda found: f"{len(found)} photos without a {kind}"
    )

    # The photos come by subject, so each model is loaded once.
    @lru_cache(maxsize=1)
    def get_model(subject: int) -> Model:
        return load(subjects[subject], device)

    def make_item(photo: Photo) -> Made:
        return make(photo, get_model(photo.subject))

    make_distributed(context, f"{kind}s", same, make_item, keep)
    get_model.cache_clear()
    reporter.free_unused_memory(device)


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
    own = [photo_file.drop_saved_mask(photo, folder) for photo in photos]
    bare = [photo for photo in own if photo.mask_path is None]
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
"""The names of generated images."""
UNUSED = (
    "{folder}: {unused} generated class images are of another base, class prompt, size or --seed, "
    "or of an earlier version: they stay unused, and {lacking} of “{prompt}” are drawn."
)
"""Said where images are drawn beside generated ones."""


@dataclass(frozen=True)
class ClassImages:
    """The generated class images of one prompt, base, seed and size.

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
        """Whether the image was drawn, and opens."""
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
        """Of the noise, one for each image."""
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
    found: dict[tuple[str, str | None], list[Photo]] = {}
    subjects = config.each_subject
    rule = augment.build_crop_rule(config)
    keys = [(subject.class_prompt, subject.class_data_dir) for subject in subjects]
    for subject, key in zip(subjects, keys):
        if key in found:
            continue
        own = [photo for photo in photos if keys[photo.subject] == key]
        sizes = Counter(rule.get_target_size(photo.size_px) for photo in own)
        folder = Path(subject.class_data_dir or context.run_dir.class_images_dir)
        found[key] = fill_class_images(folder, subject, context, pipeline, sizes, digests)
    return [found[key] for key in keys]


def fill_class_images(
    folder: Path,
    config: TrainConfig,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    sizes: Mapping[tuple[int, int], int],
    digests: Mapping[str, str],
) -> list[Photo]:
    """The user's own class images, then generated ones up to `num_class_images`.

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
        home = Placement(pipeline, accelerator.device)
        home.enter()

        # As many at once as found room before.
        at_once = config.sample_batch_size

        def set_batch_size(size: int) -> None:
            nonlocal at_once
            at_once = size

        def draw(batch: ClassBatch) -> list[bytes]:
            together = partial(
                generate_images,
                pipeline,
                batch.images.prompt,
                should_stop=context.should_stop,
                size_px=batch.images.size_px,
                text_options=batch.images.text_options,
            )
            pictures = in_batches(
                batch.seeds, at_once, together, accelerator.device, set_batch_size
            )
            return [encode_png(picture) for picture in pictures]

        make_distributed(context, "class_images", lacking, draw, ClassBatch.keep)
        home.end()

    # Every process looks into the folder, and all have to find the same.
    usable = partial(find_usable_class_photos, folder, config, sets)
    return require_agreement(accelerator, usable, lambda found: f"{len(found)} class images")


def plan_class_images(
    folder: Path,
    config: TrainConfig,
    sizes: Mapping[tuple[int, int], int],
    digests: Mapping[str, str],
) -> tuple[ClassImageSets, list[ClassBatch]]:
    """The sets of the run beside the user's own images, and the batches to draw for them. The
    folder is made, and generated images that are there and not used are logged."""
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
    found = []
    if folder.is_dir():
        found = find_photos(folder, config.class_prompt, config.resolution, alpha="white").photos
    generated = {photo.path for photo in found if is_generated(photo)}
    wanted = max(0, config.num_class_images - (len(found) - len(generated)))
    counts = split_total(sizes, wanted)

    # What is to be drawn of them.
    folder.mkdir(parents=True, exist_ok=True)
    clean_temporaries(folder)
    counted = [(images, counts[images.size_px]) for images in sets]
    lacking = []
    for images, count in counted:
        lacking += images.list_missing(count, config.sample_batch_size)
        generated -= {images.get_path(index) for index in range(count)}
    if lacking and generated:
        line = UNUSED.format(
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
    found = list_usable_photos(report)
    usable = [photo for photo in found if not is_generated(photo)]

    # Generated ones of this run's sets; others are of another prompt, base, seed or size.
    wanted = set()
    for images, count in sets:
        wanted |= {images.get_path(index) for index in range(count)}
    usable += [photo for photo in found if photo.path in wanted]
    usable = usable[: config.num_class_images]
    if len(usable) < config.num_class_images:
        raise UserError(
            f"only {len(usable)} of {config.num_class_images} class images in {folder} "
            "can be used; remove the broken ones, which are then made again, "
            "or give another --class_data_dir."
        )
    return usable


def is_generated(photo: Photo) -> bool:
    """Whether a picture among the class images was generated, as its name tells."""
    return GENERATED_PATTERN.fullmatch(photo.path.name) is not None
