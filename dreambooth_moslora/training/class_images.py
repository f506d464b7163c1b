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

from dreambooth_moslora.base.families import encoding_options
from dreambooth_moslora.disk.atomic import atomic_write, clean_stale
from dreambooth_moslora.disk.contents import content_key
from dreambooth_moslora.disk.paths import public_name
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.generation.offload import Home
from dreambooth_moslora.generation.sampling import generate_images, in_batches
from dreambooth_moslora.photos import augment, masks, photo_file
from dreambooth_moslora.photos.captions import (
    Captioner,
    MadeCaption,
    keep,
    load_captioner,
    make_for_run,
)
from dreambooth_moslora.photos.folder import find_photos, usable_photos
from dreambooth_moslora.photos.photo_file import Photo, UnreadableImageError, open_image
from dreambooth_moslora.pictures import png_bytes
from dreambooth_moslora.plan.distributed import agreed, on_main, share_out
from dreambooth_moslora.plan.plan import shares
from dreambooth_moslora.seeds import seed_of
from dreambooth_moslora.settings.family_facts import text_options_of
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import reporter

logger = logging.getLogger(__name__)

# What is made: a `Made` of each `Item`, by a `Model`.
Item = TypeVar("Item")
Made = TypeVar("Made")
Model = TypeVar("Model")


def make_missing(
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

    def own(share: Sequence[Item]) -> Generator[Made, None, None]:
        for item in share:
            context.raise_if_asked()
            yield make(item)

    # How many are done, each time that one is kept.
    def counts() -> Iterator[int]:
        made = share_out(accelerator, items, own)
        for count, (item, one) in enumerate(zip(items, made, strict=True), start=1):
            on_main(accelerator, partial(keep, item, one))
            yield count

    for _ in context.report.counted(phase, counts(), len(items)):
        pass
    context.stop_if_asked()


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
    same = agreed(
        context.accelerator, lambda: photos, lambda found: f"{len(found)} photos without a {kind}"
    )

    # The photos come by subject, so each model is loaded once.
    @lru_cache(maxsize=1)
    def model_of(subject: int) -> Model:
        return load(subjects[subject], device)

    def make_one(photo: Photo) -> Made:
        return make(photo, model_of(photo.subject))

    make_missing(context, f"{kind}s", same, make_one, keep)
    model_of.cache_clear()
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
    def make(photo: Photo, captioner: Captioner) -> MadeCaption:
        return make_for_run(photo, captioner, subjects[photo.subject].instance_prompt, path)

    def tell(photo: Photo, made: MadeCaption) -> None:
        keep(path, made, subjects[photo.subject].instance_prompt)
        logger.info("%s", spelled_out(f"{photo.path.name}: {made.caption or made.remark}"))

    make_for_photos(
        config,
        context,
        kind="caption",
        photos=bare,
        load=load_captioner,
        make=make,
        keep=tell,
    )


def make_masks(config: TrainConfig, context: reporter.RunContext, photos: list[Photo]) -> None:
    """Make the masks that the photos and the run folder lack. Raises UserError and
    StopRequestedError."""
    if config.masks == "given":
        return
    folder = context.run_dir.masks_dir

    # Masks that training made are asked for again: `make_kept` finds those that are here.
    own = [photo_file.without_kept_mask(photo, folder) for photo in photos]
    bare = [photo for photo in own if photo.mask_path is None]
    if not bare:
        return

    def tell(photo: Photo, mask: masks.MadeMask) -> None:
        if mask.remark:
            logger.warning("%s", spelled_out(f"the mask of {photo.path.name}: {mask.remark}"))

    make_for_photos(
        config,
        context,
        kind="mask",
        photos=bare,
        load=masks.load_segmenter,
        make=partial(masks.make_kept, folder=folder),
        keep=tell,
    )


GENERATED = re.compile(r"class_[0-9a-f]{8}_\d{5}\.png")
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

    def path(self, index: int) -> Path:
        """Return the file of an image. Its name says what shapes the image: those of another
        prompt, base, seed, size or encoding have other names."""
        height, width = self.size_px
        size = height if height == width else f"{width}x{height}"
        tag = seed_of(self.prompt, self.model, self.seed, size, *self.text_options.values())
        return self.folder / f"class_{tag % 16**8:08x}_{index:05d}.png"

    def is_there(self, index: int) -> bool:
        """Whether the image was drawn, and opens."""
        try:
            open_image(self.path(index))
        except UnreadableImageError:
            return False
        return True

    def lacking(self, count: int, batch_size: int) -> list["ClassBatch"]:
        """Return the batches of the first `count` images that lack one: drawn in another batch, an
        image has other bytes."""
        batches = []
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            if not all(map(self.is_there, indices)):
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
        return [seed_of(seed, "class_image", index) % 2**32 for index in self.indices]

    def keep(self, files: list[bytes]) -> None:
        """Write those files. An image that is there stays, as a run that shares the folder may have
        read it."""
        for index, content in zip(self.indices, files, strict=True):
            if not self.images.is_there(index):
                atomic_write(self.images.path(index), content)


Sets = list[tuple[ClassImages, int]]
"""Sets of generated images, one per size, each with the wanted number."""


def class_photos_of_each(
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
    rule = augment.crop_rule(config)
    keys = [(subject.class_prompt, subject.class_data_dir) for subject in subjects]
    for subject, key in zip(subjects, keys):
        if key in found:
            continue
        own = [photo for photo in photos if keys[photo.subject] == key]
        sizes = Counter(rule.target(photo.size_px) for photo in own)
        folder = Path(subject.class_data_dir or context.run_dir.class_images_dir)
        found[key] = top_up(folder, subject, context, pipeline, sizes, digests)
    return [found[key] for key in keys]


def top_up(
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
    sets, lacking = on_main(accelerator, lambda: planned(folder, config, sizes, digests))
    if lacking:
        # Where the base is too large for the device, it is streamed as where a person draws.
        home = Home(pipeline, accelerator.device)
        home.enter()

        # As many at once as found room before.
        at_once = config.sample_batch_size

        def remember(size: int) -> None:
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
            pictures = in_batches(batch.seeds, at_once, together, accelerator.device, remember)
            return [png_bytes(picture) for picture in pictures]

        make_missing(context, "class_images", lacking, draw, ClassBatch.keep)
        home.end()

    # Every process looks into the folder, and all have to find the same.
    usable = partial(usable_class_photos, folder, config, sets)
    return agreed(accelerator, usable, lambda found: f"{len(found)} class images")


def planned(
    folder: Path,
    config: TrainConfig,
    sizes: Mapping[tuple[int, int], int],
    digests: Mapping[str, str],
) -> tuple[Sets, list[ClassBatch]]:
    """The sets of the run beside the user's own images, and the batches to draw for them. The
    folder is made, and generated images that are there and not used are logged."""
    # A set of each size. A name alone may have come to another base.
    model = f"{public_name(config.pretrained_model_name_or_path)} {content_key(**digests)}"
    options = encoding_options(text_options_of(config))
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
    counts = shares(sizes, wanted)

    # What is to be drawn of them.
    folder.mkdir(parents=True, exist_ok=True)
    clean_stale(folder)
    counted = [(images, counts[images.size_px]) for images in sets]
    lacking = []
    for images, count in counted:
        lacking += images.lacking(count, config.sample_batch_size)
        generated -= {images.path(index) for index in range(count)}
    if lacking and generated:
        line = UNUSED.format(
            folder=folder,
            unused=len(generated),
            prompt=config.class_prompt,
            lacking=sum(len(batch.indices) for batch in lacking),
        )
        logger.info("%s", spelled_out(line))
    return counted, lacking


def usable_class_photos(folder: Path, config: TrainConfig, sets: Sets) -> list[Photo]:
    """`num_class_images` images, the user's own first. Raises UserError for fewer: the prior would
    be weaker."""
    report = find_photos(folder, config.class_prompt, config.resolution, alpha="white")
    found = usable_photos(report)
    usable = [photo for photo in found if not is_generated(photo)]

    # Generated ones of this run's sets; others are of another prompt, base, seed or size.
    wanted = set()
    for images, count in sets:
        wanted |= {images.path(index) for index in range(count)}
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
    return GENERATED.fullmatch(photo.path.name) is not None
