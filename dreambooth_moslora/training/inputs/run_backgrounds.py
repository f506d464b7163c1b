"""`--new_backgrounds`: before training the frozen base draws scenes, and the photos' subjects are pasted onto them."""

from collections.abc import Generator, Sequence
from functools import partial

from diffusers import StableDiffusionXLPipeline
from PIL import Image

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.pictures import draw_contact_sheet
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.photos.backgrounds import NewBackground, background_rows, new_backgrounds
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.frozen_base import drawing_pipeline
from dreambooth_moslora.training.processes import on_main, share_out
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["with_new_backgrounds"]


def with_new_backgrounds(context: RunContext, pipeline: StableDiffusionXLPipeline, photos: list[Photo]) -> list[Photo]:
    """The photos, followed by their subjects on new scenes; missing scenes are drawn.

    Raises StopRequestedError.
    """
    config = context.config
    if not config.new_backgrounds:
        return photos
    wanted = list(new_backgrounds(config, photos, context.run_dir.backgrounds_dir))
    missing = on_main(context.accelerator, lambda: [n for n, one in enumerate(wanted) if not one.is_made])
    if missing:
        draw(context, pipeline, wanted, missing)
    on_main(context.accelerator, lambda: draw_sheet(context, wanted, is_new=bool(missing)))
    subjects = each_subject(config)
    return [*photos, *(one.as_photo(subjects[one.photo.subject]) for one in wanted)]


def draw(
    context: RunContext, pipeline: StableDiffusionXLPipeline, wanted: list[NewBackground], missing: list[int]
) -> None:
    """Draw the missing pictures, shared out to the processes. The main process writes them."""
    scenes = share_out(context.accelerator, missing, lambda own: drawn_scenes(context, pipeline, wanted, own))
    made = context.report.counter("backgrounds", len(missing))
    for number, scene in zip(missing, scenes, strict=True):
        on_main(context.accelerator, partial(wanted[number].make, scene))
        made()


def draw_sheet(context: RunContext, wanted: list[NewBackground], *, is_new: bool) -> None:
    """A sheet of all, if pictures are new or a run was killed before it had one."""
    sheet = context.run_dir.backgrounds_dir / "sheet.png"
    if is_new or not sheet.is_file():
        draw_contact_sheet(background_rows(wanted), sheet)


def drawn_scenes(
    context: RunContext, pipeline: StableDiffusionXLPipeline, wanted: list[NewBackground], numbers: Sequence[int]
) -> Generator[Image.Image, None, None]:
    """Draw the scenes of these pictures."""
    generator = drawing_pipeline(context.config, pipeline, context.accelerator.device).to(context.accelerator.device)
    for one in (wanted[number] for number in numbers):
        context.raise_if_asked()
        yield generate_images(generator, one.prompt, [one.seed], one.scene_px, context.should_stop)[0]
