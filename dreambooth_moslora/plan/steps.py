"""Count the steps of a run, and how often each photo is seen.

samples per epoch = photos × repeats × resolutions, or the number of class images if larger
steps per epoch = ⌈⌈samples / (batch × processes)⌉ / accumulation⌉, as diffusers' script counts
exposures of a photo = steps × accumulation × batch × processes / photos

Subjects are shown equally often. Each counts as if it had as many photos as the largest one: an
epoch shows each photo of that subject once, and photos of smaller ones more often.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreambooth_moslora.settings.train_config import TrainConfig

MIN_EXPOSURES = 100
"""Exposures of a photo that a subject needs; with 20 hardly anything of it is learnt."""
EXPOSURES_ADVICE = f"a subject needs {MIN_EXPOSURES} or more"

MAX_SCORINGS = 4
"""Scorings of a run whose length nobody bounds."""
IMAGE_PASSES = 25 * 2
"""Denoiser passes of a sample image: 25 steps, each with the prompt and without."""
SCORING_PASSES = 12 * 20 * 2
"""Denoiser passes of a scoring: a dozen images with the adapter, of 20 steps."""
BASE_PASSES = 10 * 20 * 2
"""Denoiser passes of the base's images, which the first scoring compares with."""
CONTEXT_IMAGES = 4
"""Images in new contexts that the end of a run draws."""


@dataclass(frozen=True)
class StepPlan:
    """Numbers of steps and exposures of a run."""

    photo_counts: tuple[int, ...]  # of each subject
    repeats: int
    photos_per_step: int
    steps_per_epoch: int
    total_steps: int

    @property
    def exposures_per_subject(self) -> float:
        return self.total_steps * self.photos_per_step / len(self.photo_counts)

    @property
    def exposures_per_photo(self) -> float:
        """Return the exposures of a photo of the subject with the most photos."""
        return self.exposures_per_subject / max(self.photo_counts)

    def describe(self) -> str:
        """Return the plan as a sentence, for a dry run and the log."""
        counts = " + ".join(map(str, self.photo_counts)) + " photos"
        exposures = f"each photo is seen about {self.exposures_per_photo:.0f} times"
        if len(self.photo_counts) > 1:
            counts = f"{len(self.photo_counts)} subjects, {counts}"
            exposures = f"each subject is seen about {self.exposures_per_subject:.0f} times"
        epochs = self.total_steps / self.steps_per_epoch
        return (
            f"{counts} × {self.repeats} repeats, {self.photos_per_step} a step: "
            f"{self.steps_per_epoch} steps an epoch; "
            f"{self.total_steps} steps = {epochs:.1f} epochs; {exposures}"
        )


def plan_steps(config: TrainConfig, photos: int | Sequence[int], world_size: int = 1) -> StepPlan:
    """Return the steps of a run.

    config: its settings
    photos: their number, or the number of each subject
    world_size: processes that share each step

    Raises ZeroDivisionError without photos (see `build_photo_report`).
    """
    # Each subject counts as if it had as many photos as the largest.
    counts = (photos,) if isinstance(photos, int) else tuple(photos)
    photo_count = len(counts) * max(counts)
    samples = photo_count * config.repeats * len(config.resolutions)
    if config.uses_class_images:
        samples = max(samples, config.num_class_images)

    # Steps of an epoch, as diffusers' script counts them.
    batches = math.ceil(samples / (config.train_batch_size * world_size))
    steps_an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    photos_a_step = config.train_batch_size * config.gradient_accumulation_steps * world_size

    # The steps of the run: given, by epochs, or by exposures.
    total = config.max_train_steps or config.num_train_epochs * steps_an_epoch
    if config.exposures_per_photo:
        total = math.ceil(config.exposures_per_photo * photo_count / photos_a_step)
    return StepPlan(
        photo_counts=counts,
        repeats=config.repeats,
        photos_per_step=photos_a_step,
        steps_per_epoch=steps_an_epoch,
        total_steps=total,
    )


def count_spare_passes(config: TrainConfig, steps: int) -> int:
    """Return the denoiser passes that scores and samples may take: a quarter of the run's time,
    which is a third of its training's.

    An image of a step counts three, as the backward pass costs two, and a prior image whose target
    the base predicts one more.
    """
    images = config.images_per_micro_batch
    passes = 3 * images + (images - config.train_batch_size) * (config.prior == "adapter_off")
    return steps * config.gradient_accumulation_steps * passes // 3


def count_scorings(config: TrainConfig, steps: int) -> int:
    """Return how often a run is scored in a quarter of its time, each time with samples: at most
    MAX_SCORINGS."""
    samples = config.sample_count * IMAGE_PASSES
    spare = count_spare_passes(config, steps) - BASE_PASSES - samples
    spare -= CONTEXT_IMAGES * IMAGE_PASSES * bool(samples)
    return min(max(spare, 0) // (SCORING_PASSES + samples), MAX_SCORINGS)


def count_sample_images(config: TrainConfig, steps: int) -> int:
    """Return how many samples fit into a quarter of a run that draws them at its beginning and end
    alone: at least 1, at most those of the settings."""
    spare = count_spare_passes(config, steps) // IMAGE_PASSES - CONTEXT_IMAGES
    return min(max(spare // 2, 1), config.sample_count)


def split_total(sizes: Mapping[tuple[int, int], int], total: int) -> dict[tuple[int, int], int]:
    """Split `total` in proportion to the photos of each size (h, w), each at least 1 if it can."""
    exact = {size: total * count / sum(sizes.values()) for size, count in sorted(sizes.items())}
    shares = dict.fromkeys(exact, int(total >= len(exact)))
    # One by one, to the size that lacks most of its exact share.
    for _ in range(total - sum(shares.values())):
        shares[max(exact, key=lambda size: exact[size] - shares[size])] += 1
    return shares
