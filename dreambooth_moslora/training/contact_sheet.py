"""Contact sheet of a run: photos beside samples. It is never uploaded."""

import logging
from collections.abc import Sequence

from PIL import Image

from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.photo_file import (
    Photo,
    open_rgb,
)
from dreambooth_moslora.pictures import SheetRow
from dreambooth_moslora.settings import prompts, train_config
from dreambooth_moslora.training.samples import Sample, ValidationSamples

logger = logging.getLogger(__name__)


def build_sheet_rows(
    config: train_config.TrainConfig,
    photos: list[Photo],
    samples: ValidationSamples,
    contexts: list[Sample],
) -> list[SheetRow]:
    """Each subject's photos, its images of step 0 and the end, new contexts; then pairs. It is
    never uploaded."""
    start = f"adapter {get_public_name(config.init_adapter)}" if config.init_adapter else "base"
    latest = list(zip(samples.requests, samples.latest)) if samples.latest_step else []
    rows = []

    # Each subject from top to bottom: what it is, what the base made of it, what the adapter does.
    for number, subject in enumerate(config.each_subject):
        subject_photos = [photo for photo in photos if photo.subject == number]
        name = f" of “{subject.instance_prompt}”" if config.subjects else ""
        subject_prompts = prompts.list_validation_prompts(subject)
        requests = [request for request in samples.requests if request.prompt in subject_prompts]
        at_end = f"Step {samples.latest_step}: the same prompts, from the same noise"
        in_context = filter_samples(contexts, prompts.list_context_prompts(subject))
        rows += [
            SheetRow(f"The photos{name}", open_readable_photos(subject_photos[:6])),
            build_row(
                f"Step 0: the {start}, before training", samples.load_first_samples(requests)
            ),
            build_row(at_end, filter_samples(latest, subject_prompts)),
            build_row("New contexts", in_context),
        ]

    # Pairs stand below all, as they are of two subjects.
    pairs = prompts.list_pair_prompts(config)
    return [*rows, build_row("Two subjects in one prompt", filter_samples(contexts, pairs))]


def filter_samples(samples: list[Sample], wanted_prompts: Sequence[str]) -> list[Sample]:
    """Return the samples of the `wanted_prompts`."""
    return [(request, image) for request, image in samples if request.prompt in wanted_prompts]


def build_row(title: str, samples: list[Sample]) -> SheetRow:
    """Return a row with the prompts as captions."""
    return SheetRow(
        title=title,
        images=[image for _, image in samples],
        captions=tuple(request.prompt for request, _ in samples),
    )


def open_readable_photos(photos: list[Photo]) -> list[Image.Image]:
    """Open the photos that can be read now; the run may have begun long ago."""
    images = []
    for photo in photos:
        try:
            images.append(open_rgb(photo))
        except UserError as error:
            logger.warning("the contact sheet is without a photo: %s", error)
    return images
