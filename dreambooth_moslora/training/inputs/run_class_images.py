"""The class images of a run: the user's own, and those that the frozen base draws before training."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import StopRequestedError, UserError
from dreambooth_moslora.core.names import public_name
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos.crops import crop_rule
from dreambooth_moslora.photos.folder import find_photos, usable_photos
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.frozen_base import drawing_pipeline
from dreambooth_moslora.training.inputs.class_images import ClassImages, shares
from dreambooth_moslora.training.processes import on_main
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["class_photos_of_each", "usable_class_photos"]


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
    config, device = context.config, context.accelerator.device
    folder = Path(config.class_data_dir) if config.class_data_dir else context.run_dir.class_images_dir
    sets = sets_of(folder, config, sizes)
    wanted = sum(count for _, count in sets)

    def generate() -> None:
        if not wanted:
            return
        generator = drawing_pipeline(config, pipeline, device).to(device)
        pictures = draw_each(generator, sets, config.sample_batch_size, context.should_stop)
        for _ in context.report.counted("class_images", pictures, wanted):
            if context.should_stop():  # only this process draws; the others wait in `on_main`
                raise StopRequestedError

    on_main(context.accelerator, generate)
    return usable_class_photos(folder, config, sets)


def sets_of(folder: Path, config: TrainConfig, sizes: Mapping[tuple[int, int], int]) -> Sets:
    """The sets to generate, one per size, beside the user's own images."""
    base_id = public_name(config.pretrained_model_name_or_path)
    sets = [ClassImages(folder, config.class_prompt, base_id, config.seed, size) for size in sizes]
    found = [photo.path for photo in class_photos_in(folder, config)]
    wanted = max(0, config.num_class_images - len(found) + len(sets[0].generated(found)))
    counts = shares(sizes, wanted)
    return [(images, counts[images.size_px]) for images in sets]


def draw_each(
    generator: StableDiffusionXLPipeline, sets: Sets, batch_size: int, should_stop: Callable[[], bool]
) -> Iterator[int]:
    """Top up one size after the other; yields how many images exist."""
    before = 0
    for images, count in sets:
        draw = partial(generate_images, generator, size_px=images.size_px, should_stop=should_stop)
        for done in images.top_up(count, batch_size, draw):
            yield before + done
        before += count


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
