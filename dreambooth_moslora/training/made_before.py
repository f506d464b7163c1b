"""What is made before the first step: captions, masks and class images.

`--captions auto`: photos without a caption get one before the base is loaded; the captioner then leaves memory.

`--masks auto`: photos without a mask get one before the base is loaded; the segmenter then leaves memory.

The class images of a run: the user's own, and those that the frozen base draws before training.
"""

import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.core.atomic_files import clean_stale
from dreambooth_moslora.core.errors import UserError, spelled_out
from dreambooth_moslora.core.names import public_name
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos.captions import MadeCaption, keep, load_captioner, make_for_run
from dreambooth_moslora.photos.crops import crop_rule
from dreambooth_moslora.photos.folder import find_photos, usable_photos, with_kept_captions
from dreambooth_moslora.photos.mask_making import MadeMask, load_segmenter, make_kept
from dreambooth_moslora.photos.masks import with_kept_masks, without_kept_mask
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.plan.processes import agreed, on_main, share_out
from dreambooth_moslora.settings.subjects import each_subject
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.class_images import ClassBatch, ClassImages, shares
from dreambooth_moslora.training.encoder import drawing_pipeline
from dreambooth_moslora.training.reporter import RunContext, free_unused_memory

logger = logging.getLogger(__name__)


def captioned_photos(context: RunContext, photos: list[Photo]) -> list[Photo]:
    """The photos; those without a caption get the one in the run folder, which is made if missing.

    Raises UserError when the model is not there, and StopRequestedError.
    """
    bare = [photo for photo in photos if not photo.is_captioned]
    if context.config.captions != "auto" or not bare:
        return photos
    make_captions(context, bare)
    free_unused_memory(context.accelerator.device)
    found = []
    for number, subject in enumerate(each_subject(context.config)):
        found += with_kept_captions(subject, [photo for photo in photos if photo.subject == number])
    return found


def make_captions(context: RunContext, photos: list[Photo]) -> None:
    """Make the photos' captions, shared out to the processes; the main process writes them into the run folder.

    All processes have the same `photos`, by subject.
    """
    accelerator, path, subjects = context.accelerator, context.run_dir.captions_path, each_subject(context.config)
    same = agreed(accelerator, lambda: photos, lambda found: f"{len(found)} photos without a caption")

    def kept() -> Iterator[MadeCaption]:
        for made in share_out(accelerator, same, partial(captions_of_each, context)):
            on_main(accelerator, partial(keep, path, made, subjects[made.photo.subject].instance_prompt))
            yield made

    for _ in context.report.counted("captions", logged_captions(kept()), len(same)):
        pass
    context.stop_if_asked()


def captions_of_each(context: RunContext, photos: Sequence[Photo]) -> Generator[MadeCaption, None, None]:
    """Make each subject's captions with its own words."""
    for number, subject in enumerate(each_subject(context.config)):
        if own := [photo for photo in photos if photo.subject == number]:
            captioner = load_captioner(subject, context.accelerator.device)
            for made in make_for_run(own, captioner, subject.instance_prompt, context.run_dir.captions_path):
                yield made
                context.raise_if_asked()


def logged_captions(made: Iterable[MadeCaption]) -> Iterator[int]:
    """Log each caption; yields its number. The user also finds it in `captions.json`."""
    for number, found in enumerate(made, start=1):
        logger.info("%s", spelled_out(f"{found.photo.path.name}: {found.caption or found.remark}"))
        yield number


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
    for _ in context.report.counted("masks", logged_masks(made), len(same)):
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


def logged_masks(made: Iterable[MadeMask]) -> Iterator[int]:
    """Log remarks on the masks; yields each mask's number."""
    for number, mask in enumerate(made, start=1):
        if mask.remark:
            logger.warning("%s", spelled_out(f"the mask of {mask.photo.path.name}: {mask.remark}"))
        yield number


Sets = list[tuple[ClassImages, int]]
"""Sets of generated images, one per size, each with the wanted number."""


def class_photos_of_each(
    context: RunContext, pipeline: StableDiffusionXLPipeline, photos: list[Photo]
) -> list[list[Photo]]:
    """The class images of each subject, in the sizes of its photos' crops. Subjects of one class share theirs.

    Raises UserError and StopRequestedError.
    """
    found: dict[tuple[str, str | None], list[Photo]] = {}
    subjects, rule = each_subject(context.config), crop_rule(context.config)
    keys = [(subject.class_prompt, subject.class_data_dir) for subject in subjects]
    for subject, key in zip(subjects, keys):
        if key not in found:
            sizes = Counter(rule.target(photo.size_px) for photo in photos if keys[photo.subject] == key)
            found[key] = make_class_images(replace(context, config=subject), pipeline, sizes)
    return [found[key] for key in keys]


def make_class_images(
    context: RunContext, pipeline: StableDiffusionXLPipeline, sizes: Mapping[tuple[int, int], int]
) -> list[Photo]:
    """The user's own class images, then generated ones up to `num_class_images`, in the proportion of `sizes`.

    Raises UserError and StopRequestedError.
    """
    config, accelerator = context.config, context.accelerator
    folder = Path(config.class_data_dir) if config.class_data_dir else context.run_dir.class_images_dir
    sets, lacking = on_main(accelerator, lambda: planned(folder, config, sizes))
    if wanted := sum(count for _, count in sets):
        for _ in context.report.counted("class_images", made(context, pipeline, lacking, wanted), wanted):
            pass
    return agreed(
        accelerator, lambda: usable_class_photos(folder, config, sets), lambda found: f"{len(found)} class images"
    )


def planned(folder: Path, config: TrainConfig, sizes: Mapping[tuple[int, int], int]) -> tuple[Sets, list[ClassBatch]]:
    """The sets of the run, and the batches that must be drawn for them. The folder is made, if it can be."""
    sets = sets_of(folder, config, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    clean_stale(folder)
    return sets, [batch for images, count in sets for batch in images.lacking(count, config.sample_batch_size)]


def sets_of(folder: Path, config: TrainConfig, sizes: Mapping[tuple[int, int], int]) -> Sets:
    """The sets to generate, one per size, beside the user's own images."""
    base_id = public_name(config.pretrained_model_name_or_path)
    sets = [ClassImages(folder, config.class_prompt, base_id, config.seed, size) for size in sizes]
    found = [photo.path for photo in class_photos_in(folder, config)]
    wanted = max(0, config.num_class_images - len(found) + len(sets[0].generated(found)))
    counts = shares(sizes, wanted)
    return [(images, counts[images.size_px]) for images in sets]


def made(
    context: RunContext, pipeline: StableDiffusionXLPipeline, lacking: list[ClassBatch], wanted: int
) -> Iterator[int]:
    """Draw the batches, shared out to the processes; the main process writes them. Yields how many images exist."""
    count = wanted - sum(len(batch.indices) for batch in lacking)
    if count:
        yield count
    drawn = share_out(context.accelerator, lacking, lambda batches: draw_each(context, pipeline, batches))
    for batch, files in zip(lacking, drawn, strict=True):
        on_main(context.accelerator, partial(batch.keep, files))
        count += len(batch.indices)
        yield count


def draw_each(
    context: RunContext, pipeline: StableDiffusionXLPipeline, batches: Sequence[ClassBatch]
) -> Generator[list[bytes], None, None]:
    """Draw this process's batches; yields the files of each."""
    generator = drawing_pipeline(context.config, pipeline, context.accelerator.device).to(context.accelerator.device)
    for batch in batches:
        context.raise_if_asked()
        size_px, should_stop = batch.images.size_px, context.should_stop
        yield batch.files(partial(generate_images, generator, size_px=size_px, should_stop=should_stop))


def class_photos_in(folder: Path, config: TrainConfig) -> list[Photo]:
    """Class images in the folder. An empty or missing folder is allowed: it will be filled."""
    if not folder.is_dir():
        return []
    return find_photos(folder, config.class_prompt, config.resolution, alpha="white").photos


def usable_class_photos(folder: Path, config: TrainConfig, sets: Sets) -> list[Photo]:
    """Exactly `num_class_images` images, the user's own before generated ones.

    Raises UserError when there are fewer: the prior would be weaker than the settings say, or off.
    """
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
