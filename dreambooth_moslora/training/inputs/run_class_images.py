"""The class images of a run: the person's own, and those that the frozen base draws before training."""

from dataclasses import replace
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.errors import StopRequestedError, UserError
from dreambooth_moslora.core.names import public_name
from dreambooth_moslora.core.subject_tables import each_subject
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos.folder import find_photos, usable_photos
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.accelerator import on_main
from dreambooth_moslora.training.frozen_base import drawing_pipeline
from dreambooth_moslora.training.inputs.class_images import ClassImages
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["class_photos_of_each", "usable_class_photos"]


def class_photos_of_each(context: RunContext, pipeline: StableDiffusionXLPipeline) -> list[list[Photo]]:
    """The class images of each subject; those of one class are the same, and made once."""
    found: dict[tuple[str, str | None], list[Photo]] = {}
    subjects = each_subject(context.config)
    for subject in subjects:
        key = subject.class_prompt, subject.class_data_dir
        if key not in found:
            found[key] = make_class_images(replace(context, config=subject), pipeline)
    return [found[subject.class_prompt, subject.class_data_dir] for subject in subjects]


def make_class_images(context: RunContext, pipeline: StableDiffusionXLPipeline) -> list[Photo]:
    """The person's own class images first, then generated ones up to `num_class_images`."""
    config, device, should_stop = context.config, context.accelerator.device, context.should_stop
    folder = Path(config.class_data_dir) if config.class_data_dir else context.run_dir.class_images_dir
    base_id = public_name(config.pretrained_model_name_or_path)
    images = ClassImages(folder, config.class_prompt, base_id, config.seed, config.resolution)
    found = [photo.path for photo in class_photos_in(folder, config)]
    size_px = config.resolution, config.resolution
    wanted = max(0, config.num_class_images - len(found) + len(images.generated(found)))

    def generate() -> None:
        if not wanted:
            return
        generator = drawing_pipeline(config, pipeline, device).to(device)
        draw = lambda prompt, seeds: generate_images(generator, prompt, seeds, size_px, should_stop)  # noqa: E731
        pictures = images.top_up(wanted, config.sample_batch_size, draw)
        for _ in context.report.counted("class_images", pictures, wanted):
            if should_stop():  # this process alone draws: the others wait in `on_main`
                raise StopRequestedError

    on_main(context.accelerator, generate)
    return usable_class_photos(folder, config, images)


def class_photos_in(folder: Path, config: TrainConfig) -> list[Photo]:
    """An empty or missing folder is no mistake here: it will be filled."""
    if not folder.is_dir():
        return []
    return find_photos(folder, config.class_prompt, config.resolution, alpha="white").photos


def usable_class_photos(folder: Path, config: TrainConfig, images: ClassImages) -> list[Photo]:
    """As many as were asked for, the person's own before generated ones.

    With fewer, the prior would be weaker than it says, and with none it would be off.
    """
    found = usable_photos(find_photos(folder, config.class_prompt, config.resolution, alpha="white"))
    paths = [photo.path for photo in found]
    stale, generated = images.stale(paths), images.generated(paths)
    found.sort(key=lambda photo: photo.path in generated)
    usable = [photo for photo in found if photo.path not in stale][: config.num_class_images]
    if len(usable) < config.num_class_images:
        raise UserError(
            f"only {len(usable)} of {config.num_class_images} class images in {folder} can be used; "
            "remove the broken ones, which are then made anew, or give another --class_data_dir."
        )
    return usable
