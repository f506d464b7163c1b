"""`--new_backgrounds`: before training the frozen base draws scenes, and the photos' subjects are pasted onto them."""

from collections.abc import Iterator

from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import StopRequestedError, UserError
from dreambooth_moslora.core.pictures import draw_contact_sheet
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos.backgrounds import NO_MASKS, NewBackground, background_rows, new_backgrounds
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.frozen_base import drawing_pipeline
from dreambooth_moslora.training.processes import on_main
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["check_masks", "with_new_backgrounds"]


def with_new_backgrounds(context: RunContext, pipeline: StableDiffusionXLPipeline, photos: list[Photo]) -> list[Photo]:
    """The photos, followed by their subjects on new scenes; missing scenes are drawn.

    Raises StopRequestedError.
    """
    config = context.config
    if not config.new_backgrounds:
        return photos
    wanted = list(new_backgrounds(config, photos, context.run_dir.backgrounds_dir))
    if any(not one.is_made for one in wanted):
        on_main(context.accelerator, lambda: draw(context, pipeline, wanted))
    subjects = each_subject(config)
    return [*photos, *(one.as_photo(subjects[one.photo.subject]) for one in wanted)]


def check_masks(config: TrainConfig, photos: list[Photo]) -> None:
    """Raises UserError when new backgrounds are asked for and no photo has a mask."""
    if config.new_backgrounds and all(photo.mask_path is None for photo in photos):
        raise UserError(NO_MASKS)


def draw(context: RunContext, pipeline: StableDiffusionXLPipeline, wanted: list[NewBackground]) -> None:
    """Draw the pictures and a sheet of them into the run folder, in this process alone; the others wait in
    `on_main`."""
    config, device = context.config, context.accelerator.device
    generator = drawing_pipeline(config, pipeline, device).to(device)

    def pictures() -> Iterator[int]:
        for number, one in enumerate(wanted, start=1):
            if not one.is_made:
                scene = generate_images(generator, one.prompt, [one.seed], one.scene_px, context.should_stop)[0]
                one.make(scene)
            yield number

    for _ in context.report.counted("backgrounds", pictures(), len(wanted)):
        if context.should_stop():
            raise StopRequestedError
    draw_contact_sheet(background_rows(wanted), context.run_dir.backgrounds_dir / "sheet.png")
