"""`--captions auto`: photos without a caption get one before the base is loaded; the captioner then leaves memory."""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.errors import spelled_out
from dreambooth_moslora.photos.caption_making import MadeCaption, keep, make_for_run
from dreambooth_moslora.photos.captioners import load_captioner
from dreambooth_moslora.photos.folder import with_kept_captions
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.processes import agreed, on_main, share_out
from dreambooth_moslora.training.reporter import free_unused_memory
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["captioned_photos"]

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

    for _ in context.report.counted("captions", said(kept()), len(same)):
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


def said(made: Iterable[MadeCaption]) -> Iterator[int]:
    """Log each caption; yields its number. The user also finds it in `captions.json`."""
    for number, found in enumerate(made, start=1):
        logger.info("%s", spelled_out(f"{found.photo.path.name}: {found.caption or found.remark}"))
        yield number
