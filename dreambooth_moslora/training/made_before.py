"""What a run makes before its first step: captions, masks and class images that photos and folders
lack.

Captions and masks (`--captions auto`, `--masks auto`) are made before the base is loaded.

Class images for prior preservation (Ruiz et al. 2022, section 3.3) show what the base already knows
of the class. A folder is topped up to the wanted number with generated images of the class prompt.
`manifest.json` beside them records how each was made: prompt, seed, model, size, text options, and
its SHA-256. The user's own images count and come first. Generated images of another prompt, model,
size or encoding stay in the folder but are not used. A generated image is drawn again when its file
or its entry in the manifest is damaged.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.pipelines import denoiser_of, encoding_options
from dreambooth_moslora.disk import queue
from dreambooth_moslora.disk.atomic import atomic_write, clean_stale, rename
from dreambooth_moslora.disk.contents import file_digest, read_json
from dreambooth_moslora.disk.paths import public_name
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos import masks, photo_file
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
from dreambooth_moslora.plan.distributed import DTYPES, agreed, on_main, share_out
from dreambooth_moslora.plan.plan import shares
from dreambooth_moslora.seeds import seed_of
from dreambooth_moslora.settings.families import text_options_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import frozen_base, reporter

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
    """`make` each of the `items`, equal in all processes and shared out; the main process does
    `keep`. Reported is each item's `size` on top of `done`. Raises StopRequestedError between
    items, and one's error in all."""
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
    photos: list[Photo],
    load: Callable[[TrainConfig, torch.device], Model],
    make: Callable[[Photo, Model], Made],
    keep: Callable[[Photo, Made], object],
) -> None:
    """Make what the photos, in the order of their subjects, lack, by each subject's model; one is
    in memory."""
    subjects, device = config.each_subject, context.accelerator.device
    same = agreed(
        context.accelerator, lambda: photos, lambda found: f"{len(found)} photos without a {kind}"
    )
    model_of = lru_cache(maxsize=1)(lambda subject: load(subjects[subject], device))
    make_missing(
        context, f"{kind}s", same, lambda photo: make(photo, model_of(photo.subject)), keep
    )
    model_of.cache_clear()
    reporter.free_unused_memory(device)


def make_captions(config: TrainConfig, context: reporter.RunContext, photos: list[Photo]) -> None:
    """Make the captions that the photos and the run folder lack. Raises UserError and
    StopRequestedError."""
    bare = [photo for photo in photos if not photo.is_captioned]
    if config.captions != "auto" or not bare:
        return
    subjects, path = config.each_subject, context.run_dir.captions_path

    def make(photo: Photo, captioner: Captioner) -> MadeCaption:
        return make_for_run(photo, captioner, subjects[photo.subject].instance_prompt, path)

    def tell(photo: Photo, made: MadeCaption) -> None:
        keep(path, made, subjects[photo.subject].instance_prompt)
        logger.info("%s", spelled_out(f"{photo.path.name}: {made.caption or made.remark}"))

    make_for_photos(config, context, "caption", bare, load_captioner, make, tell)


def make_masks(config: TrainConfig, context: reporter.RunContext, photos: list[Photo]) -> None:
    """Make what the run folder lacks of masks for the photos without one. Raises UserError,
    StopRequestedError."""
    if config.masks != "auto":
        return
    folder = context.run_dir.masks_dir

    def tell(photo: Photo, mask: masks.MadeMask) -> None:
        if mask.remark:
            logger.warning("%s", spelled_out(f"the mask of {photo.path.name}: {mask.remark}"))

    own = [photo_file.without_kept_mask(photo, folder) for photo in photos]
    if bare := [photo for photo in own if photo.mask_path is None]:
        make_for_photos(
            config,
            context,
            "mask",
            bare,
            masks.load_segmenter,
            partial(masks.make_kept, folder=folder),
            tell,
        )


MANIFEST, DIGEST = "manifest.json", "sha256"
LOCK_NAME, LOOK_SEC = ".class_images.lock", 0.5  # Of a folder that several runs may share
GENERATED = re.compile(r"class_[0-9a-f]{8}_\d{5}\.png")


@dataclass(frozen=True)
class ClassImages:
    """The class images of one prompt, base and size (h, w) in `folder`; `model` names the base
    without its path. `text_options` are arguments of `encode_prompt` that the run sets."""

    folder: Path
    prompt: str
    model: str
    seed: int
    size_px: tuple[int, int]
    text_options: dict[str, Any] = field(default_factory=dict)

    @property
    def resolution(self) -> int | str:
        """As the manifest writes it: the side of a square, else width x height."""
        height, width = self.size_px
        return height if height == width else f"{width}x{height}"

    def name(self, index: int) -> str:
        tag = seed_of(*self.facts().values()) % 16**8
        return f"class_{tag:08x}_{index:05d}.png"

    def image_seed(self, index: int) -> int:
        return seed_of(self.seed, "class_image", index) % 2**32

    def manifest(self) -> dict[str, dict]:
        """File name -> {prompt, seed, model, resolution, perhaps sha256} of every generated image;
        {} if damaged."""
        with suppress(UserError):
            return read_json(self.folder / MANIFEST, dict[str, dict[str, Any]])
        return {}

    def stale(self, paths: list[Path]) -> set[Path]:
        """The generated images of another or unknown prompt, model or size."""
        known, wanted = self.manifest(), self.facts().items()
        return {
            path for path in self.generated(paths) if not wanted <= known.get(path.name, {}).items()
        }

    def generated(self, paths: list[Path]) -> set[Path]:
        """The images that were generated. Their names tell, even without the manifest."""
        known = self.manifest()
        return {path for path in paths if path.name in known or GENERATED.fullmatch(path.name)}

    def lacking(self, count: int, batch_size: int) -> list["ClassBatch"]:
        """The batches of the first `count` images in which one is missing, whole: last bits depend
        on neighbours."""
        known, found = self.manifest(), []
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            missing = tuple(index for index in indices if not self._is_as_made(index, known))
            if not missing:
                continue
            seeds = []
            for index in indices:  # another run may have drawn the image
                seed = known.get(self.name(index), {}).get("seed")
                is_one = type(seed) is int and 0 <= seed < 2**32
                seeds.append(seed if is_one else self.image_seed(index))
            found.append(ClassBatch(self, tuple(indices), tuple(seeds), missing))
        paths = [self.folder / self.name(index) for batch in found for index in batch.missing]
        if damaged := [path for path in paths if os.path.lexists(path)]:
            said = "has changed since it was made: it is drawn again, like every other changed class image."
            logger.warning("%s", spelled_out(f"{damaged[0]} {said}"))
        return found

    def facts(self) -> dict[str, object]:
        encoding = {name: str(value) for name, value in self.text_options.items()}
        return {
            "prompt": self.prompt,
            "model": self.model,
            "resolution": self.resolution,
            **encoding,
        }

    def _is_as_made(self, index: int, known: dict[str, dict]) -> bool:
        """Whether the file exists, opens, has the right size, and matches its manifest entry."""
        path, made = self.folder / self.name(index), known.get(self.name(index), {})
        try:
            fits = open_image(path).size == self.size_px[::-1]
        except UnreadableImageError:
            return False
        return (
            fits
            and self.facts().items() <= made.items()
            and made.get(DIGEST) in (None, file_digest(path))
        )

    def write(self, index: int, seed: int, content: bytes) -> None:
        """Write the manifest's entry, then the image. An edited picture in its place goes to the
        folder `changed`."""
        path = self.folder / self.name(index)
        facts = {**self.facts(), "seed": seed, DIGEST: hashlib.sha256(content).hexdigest()}
        entries = {**self.manifest(), path.name: facts}
        with suppress(UnreadableImageError):
            open_image(path)
            if (found := file_digest(path)) != facts[DIGEST]:  # the user may have edited it
                kept = self.folder / "changed"
                kept.mkdir(exist_ok=True)
                rename(path, kept / f"{path.stem}_{found[:8]}.png")
        atomic_write(self.folder / MANIFEST, json.dumps(entries, indent=1, sort_keys=True))
        atomic_write(path, content)


@dataclass(frozen=True)
class ClassBatch:
    images: ClassImages
    indices: tuple[int, ...]  # generated together
    seeds: tuple[int, ...]  # of each
    missing: tuple[int, ...]  # which are kept

    def __len__(self) -> int:
        return len(self.indices)

    def files(self, generate: Callable[[str, list[int]], list[Image.Image]]) -> list[bytes]:
        """Generate the batch; returns the missing images as PNG files."""
        pictures = dict(
            zip(self.indices, generate(self.images.prompt, list(self.seeds)), strict=True)
        )
        return [png_bytes(pictures[index]) for index in self.missing]

    def keep(self, files: list[bytes]) -> None:
        """Write those files. One process does it: all images are listed in one manifest."""
        seed_of_each = dict(zip(self.indices, self.seeds))
        for index, content in zip(self.missing, files, strict=True):
            self.images.write(index, seed_of_each[index], content)


# Sets of generated images, one per size, each with the wanted number
Sets = list[tuple[ClassImages, int]]


def class_photos_of_each(
    config: TrainConfig,
    base: Base,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    photos: list[Photo],
) -> list[list[Photo]]:
    """Class images of each subject, in the sizes of its photos' crops. Subjects of one class share
    theirs."""
    found: dict[tuple[str, str | None], list[Photo]] = {}
    subjects, rule = config.each_subject, photo_file.crop_rule(config)
    keys = [(subject.class_prompt, subject.class_data_dir) for subject in subjects]
    for subject, key in zip(subjects, keys):
        if key not in found:
            sizes = Counter(
                rule.target(photo.size_px) for photo in photos if keys[photo.subject] == key
            )
            folder = Path(subject.class_data_dir or context.run_dir.class_images_dir)
            with alone_in(folder, context) if subject.class_data_dir else nullcontext():
                found[key] = top_up(folder, subject, base, context, pipeline, sizes)
    return [found[key] for key in keys]


@contextmanager
def alone_in(folder: Path, context: reporter.RunContext) -> Iterator[None]:
    """Let runs that share the folder draw one after the other, as they write one manifest and the
    same names. A stop ends the wait. In a folder that cannot be written nothing is drawn, and
    nobody waits."""
    path, held = folder / LOCK_NAME, []

    def wait() -> None:
        is_told = False
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            while not held:
                context.raise_if_asked()
                try:
                    held.append(queue.take(path, "--class_data_dir"))
                except UserError:
                    if not is_told:
                        logger.warning(
                            "%s",
                            spelled_out(f"{folder}: another run draws there, and this one waits"),
                        )
                    is_told = True
                    time.sleep(LOOK_SEC)

    on_main(context.accelerator, wait)
    try:
        yield
    finally:
        for file in held:
            queue.release(path, file)


def top_up(
    folder: Path,
    config: TrainConfig,
    base: Base,
    context: reporter.RunContext,
    pipeline: DiffusionPipeline,
    sizes: Mapping[tuple[int, int], int],
) -> list[Photo]:
    """The user's own class images, then generated ones up to `num_class_images`, in the proportion
    of `sizes`."""
    accelerator = context.accelerator
    sets, lacking = on_main(accelerator, lambda: planned(folder, config, sizes))
    if wanted := sum(count for _, count in sets):
        precision, device = denoiser_of(pipeline).dtype, accelerator.device
        asked = DTYPES.get(config.prior_generation_precision or "", precision)

        @cache
        def drawing() -> DiffusionPipeline:
            return (
                pipeline
                if asked == precision
                else frozen_base.load_base(config, base, asked, device)
            ).to(device)

        def draw(batch: ClassBatch) -> list[bytes]:
            settings = {"size_px": batch.images.size_px, "text_options": batch.images.text_options}
            return batch.files(
                partial(generate_images, drawing(), should_stop=context.should_stop, **settings)
            )

        done = wanted - sum(map(len, lacking))
        make_missing(context, "class_images", lacking, draw, ClassBatch.keep, size=len, done=done)
    usable = partial(usable_class_photos, folder, config, sets)
    return agreed(accelerator, usable, lambda found: f"{len(found)} class images")


def planned(
    folder: Path, config: TrainConfig, sizes: Mapping[tuple[int, int], int]
) -> tuple[Sets, list[ClassBatch]]:
    """The sets of the run beside the user's own images, and the batches to draw for them. The
    folder is made."""
    base_id = public_name(config.pretrained_model_name_or_path)
    options = encoding_options(text_options_of(config))
    sets = [
        ClassImages(folder, config.class_prompt, base_id, config.seed, size, options)
        for size in sizes
    ]
    paths = []
    if folder.is_dir():
        found = find_photos(folder, config.class_prompt, config.resolution, alpha="white").photos
        paths = [photo.path for photo in found]
    wanted = max(0, config.num_class_images - len(paths) + len(sets[0].generated(paths)))
    counts = shares(sizes, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    clean_stale(folder)
    counted = [(images, counts[images.size_px]) for images in sets]
    return counted, [
        batch
        for images, count in counted
        for batch in images.lacking(count, config.sample_batch_size)
    ]


def usable_class_photos(folder: Path, config: TrainConfig, sets: Sets) -> list[Photo]:
    """`num_class_images` images, the user's own first. Raises UserError for fewer: the prior would
    be weaker."""
    found = usable_photos(
        find_photos(folder, config.class_prompt, config.resolution, alpha="white")
    )
    paths = [photo.path for photo in found]
    stale = set.intersection(*(images.stale(paths) for images, _ in sets))
    wanted = {folder / images.name(index) for images, count in sets for index in range(count)}
    generated = sets[0][0].generated(paths)
    own = [photo for photo in found if photo.path not in generated]
    usable = [*own, *(photo for photo in found if photo.path in wanted - stale)][
        : config.num_class_images
    ]
    if len(usable) < config.num_class_images:
        raise UserError(
            f"only {len(usable)} of {config.num_class_images} class images in {folder} can be used; "
            "remove the broken ones, which are then made again, or give another --class_data_dir."
        )
    return usable
